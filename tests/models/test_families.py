"""Every family: what is found in it, and that recording is exact and leaves no trace. See ``families_table.py``."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clue_fast
from clue_fast.sites import survey
from tests.models.families import FAMILIES, IMAGE, IMAGES, SEQ2SEQ, make_batch, make_model
from tests.models.reference import counts, statistics_of, watching

ALL = sorted(FAMILIES)
COMPILED = ("bert", "gpt2", "llama", "mixtral", "opt", "phi3", "t5")  # one of each structure; the others are slow
HEADS = [name for name in ALL if name != "qwen2_vl"]  # token ids do not reach the heads of its vision tower


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def record(model: nn.Module, batch: dict[str, Tensor], **how: Any) -> clue_fast.Statistics:
    """Statistics of one batch."""
    kinds, strict = how.pop("kinds", ("mlp", "expert")), how.pop("strict", True)
    with clue_fast.patch(model, kinds=kinds, strict=strict) as patched:
        with patched.record("forget", **how):
            out = model(**batch)
            if how.get("gradients"):
                out.loss.backward()
        return patched.statistics


def assert_same(left: clue_fast.Statistics, right: clue_fast.Statistics) -> None:
    """Equal counts, and sums within what float32 activations of the same model differ by from kernel to kernel."""
    assert torch.equal(left.count, right.count)
    assert int(left.count.sum()) > 0
    assert (left.gradient_values is None) == (right.gradient_values is None)
    for found, expected in zip(left.tensors(), right.tensors(), strict=True):
        if found.is_floating_point():
            scale = expected[0].abs().amax(dim=-1, keepdim=True)
            assert float(scale.min()) > 0
            assert bool(((found[0] - expected[0]).abs() <= 1e-5 * scale).all())


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", ALL)
def test_sites(name: str) -> None:
    """What is found is what the family has, in every layer and with nothing left over."""
    model, family = make_model(name), FAMILIES[name]
    found = survey(model)
    assert not found.unmatched
    assert {site.structure for site in found.sites} == family.structures
    layers = {site.path.partition(f".{site.layer}.")[0] + str(site.layer) for site in found.sites}
    assert len(layers) == (4 if family.task in (SEQ2SEQ, IMAGES) else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALL)
def test_parity(name: str, dtype: torch.dtype) -> None:
    """Logits while recording are within twice the rounding error of the stock model, and as exact."""
    model, batch = make_model(name, dtype), cast(make_batch(name), dtype)
    try:
        stock = logits(model, batch).double()
    except RuntimeError:
        if dtype != torch.bfloat16:
            raise
        pytest.skip("the stock model does not run in bfloat16")
    wide = make_model(name, torch.float64)
    wide.load_state_dict(model.state_dict())
    exact = logits(wide, cast(batch, torch.float64))
    with clue_fast.patch(model, strict=FAMILIES[name].strict) as patched:
        fused = logits(model, batch).double()
        with patched.record("forget"):
            recorded = logits(model, batch).double()
    rounding = (stock - exact).norm()
    for found in (fused, recorded):
        assert (found - exact).norm() <= 2 * rounding
        assert (found - stock).norm() <= 2 * rounding


WITH_HEADS = [(name, False) for name in ALL] + [(name, True) for name in HEADS]


def kept_by_hooks(model: nn.Module, name: str, heads: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Activations and products of the tokens that count, by the name of the site, from the stock model."""
    batch = cast(make_batch(name), next(model.parameters()).dtype)
    with watching(model, name, heads) as seen:
        model(**batch).loss.backward()
    model.zero_grad()
    return {path: kept.counted(counts(name, path, batch, sum(map(len, kept.tokens)))) for path, kept in seen.items()}


def recorded(model: nn.Module, name: str, heads: bool) -> clue_fast.Statistics:
    """The same, recorded."""
    batch, kinds = (
        cast(make_batch(name), next(model.parameters()).dtype),
        ("attention",) if heads else ("mlp", "expert"),
    )
    return record(model, batch, gradients=True, kinds=kinds, strict=FAMILIES[name].strict)


@pytest.mark.parametrize(("name", "heads"), WITH_HEADS)
def test_statistics(name: str, heads: bool) -> None:
    """In float64 statistics, with a·∂L/∂a, equal those from activations that hooks keep."""
    model = make_model(name, torch.float64)
    kept, statistics = kept_by_hooks(model, name, heads), recorded(model, name, heads)
    assert len(statistics.sites) == len(kept) > 0
    for site in statistics.sites:
        activations, products = kept[site.output if site.kind == "mlp" else site.name]
        assert int(statistics.count[0, statistics.number(site)]) == len(activations)
        if len(activations) == 0:
            continue
        found = statistics.of(site, "forget")
        wanted = statistics_of(activations, products)
        for key, expected in wanted.items():
            # A sum in which terms cancel errs as much as they do.
            scale = float(wanted[{"mean": "abs_mean", "attribution": "abs_attribution"}.get(key, key)].abs().max())
            error = float((getattr(found, key) - expected).abs().max())
            assert error <= 1e-9 * scale, f"{key} of {site.name} is off by {error}, its largest value is {scale}"


@pytest.mark.parametrize(("name", "heads"), WITH_HEADS)
def test_statistics_in_float32(name: str, heads: bool) -> None:
    """In float32 they are from float64 at most twice as far as those that PyTorch computes from the stock model.

    Over all sites together, each by its largest value; no value is nearer than its rounding to float32.
    """
    model = make_model(name)
    wide = make_model(name, torch.float64)
    wide.load_state_dict(model.state_dict())
    exact, stock = kept_by_hooks(wide, name, heads), kept_by_hooks(model, name, heads)
    statistics = recorded(model, name, heads)
    errors: defaultdict[str, list[Tensor]] = defaultdict(list)
    for site in statistics.sites:
        path = site.output if site.kind == "mlp" else site.name
        if len(exact[path][0]) == 0 or len(exact[path][0]) != len(stock[path][0]):  # another expert was nearly as good
            continue
        found = statistics.of(site, "forget")
        ours = {key: getattr(found, key) for key in statistics_of(*exact[path])}
        activations, products = stock[path]
        theirs = statistics_of(activations.float(), None if products is None else products.float())
        for key, expected in statistics_of(*exact[path]).items():
            scale = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            errors[key].append(torch.stack([(ours[key] - expected) / scale, (theirs[key].double() - expected) / scale]))
    for key, parts in errors.items():
        off = torch.cat(parts, dim=-1)
        ours_off, theirs_off = off.norm(dim=-1).tolist()
        rounding = 2.0**-24 * off.shape[-1] ** 0.5
        assert ours_off <= 2 * theirs_off + rounding, f"{key} is off by {ours_off}, PyTorch's by {theirs_off}"


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("name", ALL)
def test_checkpointing(name: str, reentrant: bool) -> None:
    """Gradient checkpointing runs the forward twice, and counts it once."""
    batch, runs = make_batch(name), []
    for checkpointing in (False, True):
        model = make_model(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.config.use_cache = False
        runs.append(record(model, batch, gradients=True, strict=FAMILIES[name].strict))
    assert_same(*runs)


@pytest.mark.parametrize("name", [n if n in COMPILED else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_compile(name: str) -> None:
    """Compiled into one graph, recording gives the same."""
    model, batch = make_model(name), compiled_batch(name)
    with torch.no_grad():
        eager = record(model, batch, strict=FAMILIES[name].strict)
        with clue_fast.patch(model, strict=FAMILIES[name].strict) as patched:
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            try:
                with patched.record("forget"):
                    compiled(**batch)
            except torch._dynamo.exc.Unsupported:
                patched.unpatch()
                skip_if_stock_does_not_compile(model, batch)
                raise
            assert_same(patched.statistics, eager)


def skip_if_stock_does_not_compile(model: nn.Module, batch: dict[str, Tensor]) -> None:
    torch.compiler.reset()
    try:
        torch.compile(model, fullgraph=True, backend="eager")(**batch)
    except torch._dynamo.exc.Unsupported:
        pytest.skip("the stock model does not compile")


def compiled_batch(name: str) -> dict[str, Tensor]:
    """A batch that the stock model can be compiled for: without labels, since the loss logs, and images of any size."""
    batch = make_batch(name)
    labels = batch.pop("labels")
    if FAMILIES[name].task == SEQ2SEQ:
        batch |= {"decoder_input_ids": labels.clamp(0), "decoder_attention_mask": (labels != -100).long()}
    if name == "qwen2_vl":
        batch = {"input_ids": batch["input_ids"] % IMAGE, "attention_mask": batch["attention_mask"]}
    return batch


@pytest.mark.parametrize("name", ALL)
def test_unpatch(name: str) -> None:
    """After unpatch, modules and logits are what they were, bit for bit; so is a model that was not patched."""
    model, batch = make_model(name), make_batch(name)
    expected = logits(model, batch)  # first of all, since a first pass may leave something of its own
    other, before = copy.deepcopy(model), trace(model)
    kinds = ("mlp", "expert", *(["attention"] if name in HEADS else []))
    with clue_fast.patch(model, kinds=kinds, strict=FAMILIES[name].strict) as patched:
        assert trace(model) != before == trace(other)
        with patched.record("forget"):
            logits(model, batch)
    assert trace(model) == before
    assert torch.equal(logits(model, batch), expected)
    assert torch.equal(logits(other, batch), expected)


def trace(model: nn.Module) -> list[object]:
    """Everything about a model that patching might leave behind."""
    return [
        (path, type(module), sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks))
        for path, module in model.named_modules()
    ]
