"""The estimate of memory against what the allocator of PyTorch then counts, and what is allocated for it: nothing."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

import clue_fast
from clue_fast.data import Collator
from clue_fast.errors import SparseError
from clue_fast.objectives import SimNPO
from clue_fast.sparse import SparseAdamW, snapshot, sparsify
from clue_fast.sparse.slices import trainable_slices
from clue_fast.trainer import estimate_memory
from tests.models.families import FAMILIES
from tests.sparse.test_families import some_units

pytestmark = pytest.mark.usefixtures("one_pass")  # as is estimated


def measure(run: Any) -> tuple[int, int]:
    """(bytes that are left, the most there were), of what a function allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del result
    return now, most


@pytest.fixture
def make_big(make_model):
    def make(dtype: torch.dtype, **config: Any) -> Any:
        return make_model(dtype, hidden_size=128, intermediate_size=512, vocab_size=512, **config).train()

    return make


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "layers"),
    [(torch.float32, False, None), (torch.bfloat16, False, [2]), (torch.bfloat16, True, None)],
)
def test_estimate_is_what_is_then_measured(dtype, checkpointing, layers, make_big, make_selection, make_examples):
    """Constant parts to the byte, activations to 4 %, of which the batch itself is some, the peak to 1 %."""
    model = make_big(dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    selection = make_selection(model, units=50, layers=layers)
    batches = {"forget": Collator(0)(make_examples(16, seed=1)), "retain": Collator(0)(make_examples(16, seed=2))}
    found = estimate_memory(model, selection, batches)
    sparse = sparsify(model, selection)
    clue_fast.patch(model)  # as trainers do
    optimizer = SparseAdamW(model)
    SimNPO().loss(model, batches, sparse)[0].backward()
    optimizer.step()
    model.zero_grad()
    counted = sparse.memory_footprint(optimizer)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.weights == counted["weights"] + buffers
    assert (found.values, found.original) == (counted["values"], counted["original"])
    assert found.optimizer_state == counted["optimizer_state"]
    constant = found.weights + found.values + found.original + found.optimizer_state
    activations, _ = measure(lambda: SimNPO().loss(model, batches, sparse)[0])
    _, most = measure(lambda: SimNPO().loss(model, batches, sparse)[0].backward())
    assert found.gradients == sum(p.grad.nbytes for p in sparse.trainable_parameters)
    assert found.activations == pytest.approx(activations, rel=0.04)
    assert found.peak - constant == pytest.approx(most, rel=0.01)


def test_allocates_nothing_and_changes_nothing(make_big, make_selection, make_batch, monkeypatch):
    monkeypatch.delenv("CLUE_FAST_BACKEND", raising=False)
    model, batch = make_big(torch.float32), make_batch()
    selection, before = make_selection(model, units=50, forget=5), snapshot(model)
    _, most = measure(lambda: clue_fast.estimate_memory(model, selection, batch))
    # Indices of the units and labels; accumulators that stay empty, and the few tokens that fusing is tried on.
    assert most < 0.1 * sum(p.nbytes for p in model.parameters())
    assert all(torch.equal(before[name], now) for name, now in snapshot(model).items())
    assert all(p.requires_grad for p in model.parameters()) and not model._forward_pre_hooks
    assert not list(trainable_slices(model)) and "CLUE_FAST_BACKEND" not in os.environ


def test_a_model_without_data_and_without_masters(make_model, make_selection, make_batch):
    """The layers of a Llama of a billion weights, of which nothing exists."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 32000, "num_attention_heads": 32}
    with torch.device("meta"):
        model = make_model(torch.bfloat16, layers=3, **sizes)
    selection = make_selection(model, units=410)
    exact, rough = (estimate_memory(model, selection, make_batch(8), master_weights=m) for m in (True, False))
    weights = sum(p.nbytes for p in model.parameters())
    assert weights <= exact.weights < weights + 2**20
    assert exact.values == exact.gradients == 4 * 3 * 410 * 2048 * 3
    assert exact.optimizer_state == 2 * exact.values and exact.original == exact.values // 2
    assert rough.values < 2**10 and rough.peak == exact.peak - exact.values + rough.values
    assert exact.peak > sum(getattr(exact, f.name) for f in fields(exact) if f.name not in ("peak", "gradients"))
    assert str(exact).splitlines()[1].split() == ["values", f"{exact.values / 2**20:.1f}", "MiB"]


def test_refuses_a_sparse_model(make_model, make_selection, make_batch):
    model = make_model()
    selection = make_selection(model)
    with sparsify(model, selection), pytest.raises(SparseError, match="estimate before sparsify"):
        estimate_memory(model, selection, make_batch())
    estimate_memory(model, selection, make_batch())


class Evenly(torch.nn.Module):
    """Chooses the experts of a mixture in turn, so that all have as many tokens."""

    def __init__(self, router: torch.nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: torch.Tensor) -> Any:
        logits, weights, chosen = self.router(hidden)
        turns = torch.arange(chosen.numel()) % logits.shape[-1]
        return logits, weights, turns.reshape(chosen.shape)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_experts_that_have_as_many_tokens_each(name):
    """Constant parts to the byte, activations to 2.5 %, the peak to 1 %."""
    config = FAMILIES[name].config
    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 512}
    sizes |= {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**FAMILIES[name].settings | sizes)
    model = transformers.AutoModelForCausalLM.from_config(settings).train()
    batch = {"input_ids": torch.randint(90, (8, 64)), "attention_mask": torch.ones(8, 64, dtype=torch.int64)}
    batch["attention_mask"][0, 60:] = 0  # without padding there is no mask, which the values of the batch decide
    batch["labels"] = batch["input_ids"]
    found = estimate_memory(model, some_units(model, ("mlp", "expert"), forget=False), batch)
    for layer in model.model.layers:
        layer.mlp.gate = Evenly(layer.mlp.gate)
    selection = some_units(model, ("mlp", "expert"), forget=False)
    sparse = sparsify(model, selection)
    clue_fast.patch(model)
    optimizer = SparseAdamW(model)
    objective = SimNPO(retain_weight=0.0)
    objective.loss(model, {"forget": batch}, sparse)[0].backward()
    optimizer.step()
    counted = sparse.memory_footprint(optimizer)
    assert (found.gradients, found.optimizer_state) == (counted["gradients"], counted["optimizer_state"])
    model.zero_grad()
    constant = found.weights + found.values + found.original + found.optimizer_state
    activations, _ = measure(lambda: objective.loss(model, {"forget": batch}, sparse)[0])
    _, most = measure(lambda: objective.loss(model, {"forget": batch}, sparse)[0].backward())
    assert found.activations == pytest.approx(activations, rel=0.025)
    assert found.peak - constant == pytest.approx(most, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimate_on_a_gpu(dtype, make_model, make_selection, make_batch):
    """The peak that the caching allocator reports for a step, to 10 %."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000, "num_attention_heads": 8}
    model = make_model(dtype, layers=8, **sizes).cuda().train()
    selection = make_selection(model, units=200)
    batch = {name: tensor.repeat(1, 5).cuda() for name, tensor in make_batch(32).items()}
    found = estimate_memory(model, selection, batch)
    sparse = sparsify(model, selection)
    optimizer = SparseAdamW(model)
    for _ in range(2):
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        SimNPO(retain_weight=0.0).loss(model, {"forget": batch}, sparse)[0].backward()
        optimizer.step()
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
