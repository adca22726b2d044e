"""Every family of models trains its selected units: packed, transposed and biased projections, heads, experts."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from clue_fast.errors import SparseError
from clue_fast.objectives import GradientDifference
from clue_fast.selection import CONFLICT, FORGET, Selection
from clue_fast.sites import find_sites, model_fingerprint
from clue_fast.sparse import SparseAdamW, changed_inside, changed_outside, snapshot, sparsify
from clue_fast.sparse.slices import trainable_slices
from tests.models.families import FAMILIES, make_batch, make_model

QUICK = ["falcon grouped", "gpt2", "phi3", "bert", "opt", "t5 gated", "qwen2_moe", "gpt_oss"]
ALL = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in sorted(FAMILIES)]
KINDS = ("mlp", "expert", "attention")


def some_units(model: nn.Module, kinds: Iterable[str] = KINDS, forget: bool = True) -> Selection:
    """A third of the units of every site, conflict and (if asked for) forget units in turn."""
    sites = tuple(find_sites(model, kinds))
    generator = torch.Generator().manual_seed(0)
    categories = {}
    for site in sites:
        categories[site] = torch.zeros(site.width, dtype=torch.int8)
        chosen = torch.randperm(site.width, generator=generator)[: max(2, site.width // 3)]
        categories[site][chosen[::2]] = CONFLICT
        categories[site][chosen[1::2]] = FORGET if forget else CONFLICT
    scores = {site: torch.zeros(site.width) for site in sites}
    return Selection(sites, categories, scores, {}, model_fingerprint(model))


def eager(model: Any) -> Any:
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def selected(part: Any, parameter: torch.Tensor) -> torch.Tensor:
    return part.where.of(parameter).index_select(part.dim, part.index)


@pytest.mark.parametrize("name", ALL)
def test_trains_what_is_selected(name):
    """Same bits forward; the gradient of a dense backward; nothing outside moves; turned back without a trace."""
    model = eager(make_model(name))
    batch, selection = make_batch(name), some_units(model)
    dense, before = copy.deepcopy(model), snapshot(model)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    model(**batch).loss.backward()
    gradients = {path: torch.zeros_like(p) if p.grad is None else p.grad for path, p in model.named_parameters()}
    model.zero_grad()
    model.requires_grad_(False)  # attention takes another kernel where a bias of T5 needs a gradient
    plain = model(**batch)
    model.requires_grad_(True)
    sparse = sparsify(model, selection)
    assert list(model.state_dict()) == keys
    found = model(**batch)
    assert torch.equal(found.logits, plain.logits) and torch.equal(found.loss, plain.loss)
    found.loss.backward()
    reached = 0
    for part in sparse.slices:
        expected = selected(part, gradients[part.path])
        if part.values.grad is None:
            assert not expected.any(), part  # an expert that no token has chosen, or a layer that is not used
            continue
        reached += 1
        assert (part.values.grad - expected).norm() <= 1e-5 * expected.norm() + 1e-9, part
    assert reached > 0.7 * len(sparse.slices)
    optimizer = SparseAdamW(model, lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        model(**batch).loss.backward()
    assert changed_outside(before, model, selection) == 0
    assert changed_inside(before, model, selection) > 0.6 * sum(p.numel() for p in sparse.trainable_parameters)
    sparse.revert()
    sparse.restore()
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(before[path], now) for path, now in snapshot(model).items())
    assert {path for path, p in model.named_parameters() if p.requires_grad} == {
        path for path, p in dense.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("name", ALL)
def test_retain_records_leave_forget_units_alone(name):
    """One backward of both sides against dense ones of each, family by family."""
    model = eager(make_model(name))
    kinds = ("mlp", "expert") if name in ("llava", "qwen2_vl") else KINDS
    dense, selection = copy.deepcopy(model), some_units(model, kinds)
    batches = {"forget": make_batch(name, rows=3, seed=1), "retain": make_batch(name, rows=2, tokens=9, seed=2)}
    if name == "qwen2_vl":
        batches["retain"] = make_batch(name, rows=2, seed=2)
        selection.sites = tuple(site for site in selection.sites if "visual" not in site.path)
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for side, weight in (("forget", -1.0), ("retain", 0.7)):
        dense.zero_grad()
        records = len(batches[side]["labels"])
        for record in range(records):
            alone = {key: tensor[record : record + 1] for key, tensor in batches[side].items()}
            if name == "qwen2_vl":
                patches = len(batches[side]["pixel_values"]) // records
                alone["pixel_values"] = batches[side]["pixel_values"][record * patches : (record + 1) * patches]
            (dense(**alone).loss * (weight / records)).backward()
        gradients[side] = {
            path: torch.zeros_like(p) if p.grad is None else p.grad.clone() for path, p in dense.named_parameters()
        }
    sparse = sparsify(model, selection)
    GradientDifference(retain_weight=0.7).loss(model, batches, sparse)[0].backward()
    for part in sparse.slices:
        expected = selected(part, gradients["forget"][part.path])
        if part.category == "conflict":
            expected = expected + selected(part, gradients["retain"][part.path])
        found = torch.zeros_like(part.values) if part.values.grad is None else part.values.grad
        assert (found - expected).norm() <= 3e-5 * expected.norm() + 1e-8, part


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_fast_experts_stay_in_evaluation_and_agree_in_training(implementation):
    model = make_model("mixtral")
    model.set_experts_implementation(implementation)
    batch, selection = make_batch("mixtral"), some_units(model, ("expert",))
    with torch.no_grad():
        plain = model(**batch)
        sparsify(model, selection)
        assert torch.equal(model(**batch).logits, plain.logits)
    torch.testing.assert_close(model(**batch).logits, plain.logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_bf16_under_checkpointing(name):
    model = eager(make_model(name, torch.bfloat16)).train()
    batch, selection = make_batch(name), some_units(model)
    before, sparse = snapshot(model), sparsify(model, selection)
    model(**batch).loss.backward()
    plain = [None if p.grad is None else p.grad.clone() for p in sparse.trainable_parameters]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sparse.limit_checkpointing()
    model(**batch).loss.backward()
    for one, p in zip(plain, sparse.trainable_parameters, strict=True):
        assert (one is None and p.grad is None) or torch.equal(one, p.grad)
    SparseAdamW(model, lr=1e-2, master_weights=False, stochastic_rounding=True).step()
    assert changed_outside(before, model, selection) == 0 < changed_inside(before, model, selection)


def test_refuses_experts_split_over_devices():
    model = eager(make_model("mixtral"))
    sparsify(model, some_units(model, ("expert",)))
    for module in model.modules():
        if hasattr(module, "trainable_slices"):
            module._is_expert_parallel = True
    with pytest.raises(SparseError, match="train without expert parallelism"):
        model(**make_batch("mixtral"))


def test_refuses_adapters_until_they_are_merged():
    peft = pytest.importorskip("peft")
    model = make_model("llama")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    selection = some_units(adapted, ("mlp",))
    with pytest.raises(SparseError, match=r"up_proj.base_layer is wrapped by an adapter; merge it"):
        sparsify(adapted, selection)
    assert not list(trainable_slices(adapted))
    merged = adapted.merge_and_unload()
    sparsify(merged, some_units(merged, ("mlp",)))
