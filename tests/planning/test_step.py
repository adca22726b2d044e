"""Planned bytes and operations of a step against what is then allocated and counted on a CPU.

Constant parts to the byte, operations to the last, activations to 2.5 %, the peak to 2 %.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate.utils.operations import convert_outputs_to_fp32
from torch.utils.flop_counter import FlopCounterMode

import clue_fast
from clue_fast.objectives import get_objective
from clue_fast.sites import find_sites
from clue_fast.sparse import SparseAdamW, sparsify
from clue_fast.sparse.lower_layers import bytes_of
from tests.models.families import FAMILIES
from tests.models.small_llama import random_selection
from tests.planning.conftest import records
from tests.trainer.test_memory import Evenly, measure

BFLOAT16 = torch.bfloat16


def selection_of(model: Any, fraction: float = 0.1) -> Any:
    """Random units, chosen as any others are."""
    statistics = clue_fast.Statistics(find_sites(model), clue_fast.sites.model_fingerprint(model))
    return clue_fast.select(clue_fast.score(statistics, "random"), fraction=fraction)


def of(plan: Any, name: str) -> Any:
    return next(one for one in plan.trainings if one.name == name)


class Original:
    """A training whose original model is the model, which costs what any other of its shape does."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def original(self) -> Any:
        return nullcontext(self.model)

    def set_batch_layout(self, *_: int) -> None:
        pass


def asking(sparse: Any) -> Any:
    """A training that keeps nothing of what the original model said: the step that is planned asks it."""
    del sparse.original_outputs
    return sparse


def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and weighted values, of all heads of the queries."""
    (records, heads, tokens, width), others = query, key[2]
    return 4 * records * heads * tokens * others * width


def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores again, and four gradients: 5 products where the forward pass has 2."""
    return attention(query, key, value) * 5 // 2


COUNTED = {
    torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._grouped_mm: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[-1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    torch.ops.clue_fast.sparse_linear_backward: lambda grad, *_, out_shape, **__: (
        2 * grad.numel() // grad[-1] * out_shape[0] * out_shape[1]
    ),
}
"""What torch has no formula for, from shapes."""


def count(run: Any) -> tuple[int, int]:
    """Operations of what gives a loss, and of its backward pass."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        loss = run()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


def check(planned: Any, run: Any, checkpoints: int = 0) -> None:
    """Measures activations and peak of a step; gradients are gone before. A checkpoint keeps a random state of 5 kB."""
    footprint = planned.footprint
    states = checkpoints * torch.get_rng_state().nbytes
    activations, most = measure(run)[0] - states, measure(lambda: run().backward())[1] - states
    constant = ("weights", "values", "original", "optimizer_state", "reference", "lower_layers", "original_outputs")
    passing = footprint.peak - sum(getattr(footprint, name) for name in constant)
    assert footprint.activations == pytest.approx(activations, rel=0.025)
    assert passing == pytest.approx(most, rel=0.02)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "objective"), [(torch.float32, "undial"), (BFLOAT16, "simnpo")])
def test_selected_units(dtype, objective, checkpointing, make_small, make_plan, batches):
    model = make_small(dtype)
    plan = make_plan(model, objective=objective, gradient_checkpointing=checkpointing)
    planned = of(plan, "selected units")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = get_objective(objective)
    sparse = asking(sparsify(model, selection_of(model)))
    clue_fast.patch(model)  # as trainers do
    sparse.limit_checkpointing()
    optimizer = SparseAdamW(model)
    loss.loss(model, batches, sparse)[0].backward()
    optimizer.step()
    counted, found = sparse.memory_footprint(optimizer), planned.footprint
    assert found.weights == counted.pop("weights") + sum(buffer.nbytes for buffer in model.buffers())
    assert {name: getattr(found, name) for name in counted} == counted
    assert planned.trained == sum(p.numel() for p in sparse.trainable_parameters)
    assert (plan.units, plan.selected) == (6 * 512, 6 * 51)
    optimizer.zero_grad()
    check(planned, lambda: loss.loss(model, batches, sparse)[0], checkpoints=6 * checkpointing)


@pytest.mark.parametrize(("dtype", "objective"), [(torch.float32, "undial"), (BFLOAT16, "gradient_difference")])
def test_all_weights(dtype, objective, make_small, make_plan, batches):
    """The plain Trainer: gradients and moments of torch's AdamW in the precision of the weights."""
    model = make_small(dtype)
    planned = of(make_plan(model, ["all weights"], objective=objective), "all weights")
    loss = get_objective(objective)
    trained = Original(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss.loss(model, batches, trained)[0].backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    assert planned.footprint.optimizer_state == sum(t.nbytes for t in moments)
    assert planned.footprint.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert planned.footprint.reference == (planned.footprint.weights if objective == "undial" else 0)
    assert planned.trained == sum(p.numel() for p in model.parameters())
    optimizer.zero_grad()
    check(planned, lambda: loss.loss(model, batches, trained)[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_weights_in_float32(checkpointing, make_small, make_plan, batches):
    """Under autocast, and logits widened, by the functions that accelerate wraps a model with."""
    model = make_small(torch.float32)
    settings = {"objective": "simnpo", "dtype": "bfloat16", "gradient_checkpointing": checkpointing}
    planned = of(make_plan(model, ["all, float32"], **settings), "all, float32")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    forward, loss = model.forward, get_objective("simnpo")
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", BFLOAT16)(forward))
    loss.loss(model, batches, Original(model))[0].backward()
    assert planned.footprint.gradients == sum(p.grad.nbytes for p in model.parameters())
    assert planned.footprint.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert planned.footprint.optimizer_state == 2 * planned.footprint.gradients
    model.zero_grad()
    check(planned, lambda: loss.loss(model, batches, Original(model))[0], checkpoints=6 * checkpointing)


@pytest.mark.filterwarnings("ignore")  # what peft says of tied weights
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_lora(dtype, make_small, make_plan, batches):
    """As peft has it."""
    model = make_small(dtype)
    planned = of(make_plan(model, ["LoRA, r=4"], objective="simnpo", lora_rank=4), "LoRA, r=4")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    loss = get_objective("simnpo")
    loss.loss(adapted, batches, Original(adapted))[0].backward()
    assert planned.trained == sum(p.numel() for p in trained)
    assert planned.footprint.values == planned.footprint.gradients == sum(p.grad.nbytes for p in trained)
    assert planned.footprint.values == sum(p.nbytes for p in trained)
    adapted.zero_grad()
    check(planned, lambda: loss.loss(adapted, batches, Original(adapted))[0])
    forward, backward = count(lambda: loss.loss(adapted, batches, Original(adapted))[0])
    assert (planned.forward_flop, planned.backward_flop) == (forward, backward)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations(checkpointing, make_small, make_plan, batches, monkeypatch):
    """Of the selected units and of all weights, as torch counts them in a real step, to the last."""
    monkeypatch.setenv("CLUE_FAST_BACKEND", "reference")
    model, loss = make_small(), get_objective("undial")
    plan = make_plan(model, ["all weights"], objective="undial", gradient_checkpointing=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    whole = of(plan, "all weights")
    assert (whole.forward_flop, whole.backward_flop) == count(lambda: loss.loss(model, batches, Original(model))[0])
    sparse = asking(sparsify(model, selection_of(model)))
    sparse.limit_checkpointing()
    clue_fast.patch(model)
    loss.loss(model, batches, sparse)  # from then on is known what comes behind the head
    some = of(plan, "selected units")
    assert (some.forward_flop, some.backward_flop) == count(lambda: loss.loss(model, batches, sparse)[0])
    assert some.backward_flop < whole.backward_flop


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_part_of_the_layers(checkpointing, make_small, make_plan, batches, monkeypatch):
    """Of the upper half: what is kept of all records to the byte, operations of the first and later epochs to the last.

    Later, the lower half does not run, nor is the original model asked. One retain record lacks its last token.
    """
    for name, place, value in (("attention_mask", -1, 0), ("attention_mask", slice(2), 1), ("labels", 11, 7)):
        batches["retain"][name][0, place] = value
    batches["forget"]["attention_mask"][:] = 1
    batches["retain"]["labels"][0, -1] = -100
    model, loss = make_small(), get_objective("undial")
    asked = {"layers": (0.5, 1.0), "objective": "undial", "forget_records": 3, "retain_records": 6}
    plan = make_plan(model, gradient_checkpointing=checkpointing, **asked)
    planned = of(plan, "selected units")
    assert (plan.units, plan.selected) == (3 * 512, 3 * 51)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sparse = asking(sparsify(model, random_selection(model, units=51, layers=[3, 4, 5])))
    sparse.limit_checkpointing()
    clue_fast.patch(model)

    def step() -> Any:
        return loss.loss(model, batches, sparse)[0]

    step()  # from then on is known what comes behind the head
    check(planned, step, checkpoints=3 * checkpointing)
    monkeypatch.setenv("CLUE_FAST_BACKEND", "reference")
    sparse.original_outputs, sparse.lower_layers.most_bytes = {}, bytes_of(1.0)
    assert (planned.forward_flop, planned.backward_flop) == count(step)
    step()  # tries whether the lower half may be left out
    assert (planned.later_forward_flop, planned.backward_flop) == count(step)
    token = 4 * 128
    assert planned.footprint.lower_layers == sparse.lower_layers.bytes + token == 9 * 32 * token
    outputs = sum(output.nbytes for output in sparse.original_outputs.values())
    assert planned.footprint.original_outputs == outputs == 3 * 20 * token
    if not checkpointing:
        gigabytes = 5.5 * 32 * token / 1e9
        less = of(make_plan(model, lower_layers_gb=gigabytes, **asked), "selected units")
        sparse.lower_layers.clear()
        sparse.lower_layers.most_bytes = bytes_of(gigabytes)
        step()
        assert less.footprint.lower_layers == sparse.lower_layers.bytes + token == 5 * 32 * token
        assert less.later_forward_flop > planned.later_forward_flop


def test_operations_by_the_definition(make_small, make_plan):
    """Two for every weight that a token is multiplied by, and four for every token that it attends to and channel.

    The head runs where an answer token is predicted alone. Backward twice that, the scores of the attention once more,
    and, of what is below all that trains, less: the first layer needs no gradient of its input. A head that does not
    train takes the gradient of its input in the forward pass. A selected slice costs two for each of its numbers and
    token.
    """
    model, tokens, length = make_small(), 9 * 32, 32
    plan = make_plan(model, ["all weights"], objective="simnpo")
    layers, width, units, heads, shared, head, labels = 6, 128, 512, 4, 2, 32, 9 * 20
    attention = width * (heads + 2 * shared) * head + heads * head * width
    mlp, lm_head = 3 * width * units, 2 * labels * width * 512
    multiplied = 2 * tokens * layers * (attention + mlp) + lm_head
    scores = 4 * tokens * length * heads * head
    whole = of(plan, "all weights")
    assert whole.forward_flop == multiplied + layers * scores
    assert whole.backward_flop == 2 * multiplied + layers * scores * 5 // 2
    some = of(plan, "selected units")
    assert some.forward_flop == whole.forward_flop + lm_head
    inputs = 2 * tokens * ((layers - 1) * (attention + mlp) + width * units) + (layers - 1) * scores * 5 // 2
    assert some.backward_flop == inputs + 2 * tokens * layers * 51 * 3 * width


def test_logits_grow_with_the_vocabulary(make_small, make_plan):
    """The peak of two real models that differ in their vocabulary differs by what is planned for logits."""
    planned, measured, loss = [], [], get_objective("undial")
    for vocabulary in (2048, 8192):
        model = make_small(vocab_size=vocabulary, layers=2)
        planned.append(of(make_plan(model, objective="undial"), "selected units").footprint)
        sets = {"forget": records(3, 1), "retain": records(6, 2)}
        sparse = asking(sparsify(model, selection_of(model)))
        clue_fast.patch(model)
        loss.loss(model, sets, sparse)[0].backward()
        model.zero_grad()
        measured.append(measure(lambda m=model, s=sparse, b=sets: loss.loss(m, b, s)[0].backward())[1])
    difference = planned[1].logits - planned[0].logits
    assert planned[1].logits > 0.25 * measured[1]
    assert difference == pytest.approx(measured[1] - measured[0], rel=0.02)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_mixtures(name, make_plan, batches):
    """Slices, gradients and state to the byte, the rest as with dense layers, where experts have as many tokens."""
    sizes = {"hidden_size": 128, "intermediate_size": 192, "vocab_size": 512, "num_hidden_layers": 5}
    sizes |= {"moe_intermediate_size": 192, "shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
    torch.manual_seed(0)
    settings = getattr(transformers, FAMILIES[name].config)(**FAMILIES[name].settings | sizes)
    model = transformers.AutoModelForCausalLM.from_config(settings).train()
    plan = make_plan(model, objective="simnpo", criterion="difference")
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    experts = [
        module for module in model.modules() if hasattr(module, "gate_up_proj") and hasattr(module, "num_experts")
    ]
    stacked = sum(module.gate_up_proj.numel() + module.down_proj.numel() for module in experts)
    assert plan.active == plan.parameters - stacked // 2  # two of four experts
    for layer in model.model.layers:
        layer.mlp.gate = Evenly(layer.mlp.gate)
    loss, planned = get_objective("simnpo"), of(plan, "selected units")
    sparse = sparsify(model, selection_of(model))
    clue_fast.patch(model)
    optimizer = SparseAdamW(model)
    loss.loss(model, batches, sparse)[0].backward()
    optimizer.step()
    counted = sparse.memory_footprint(optimizer)
    assert planned.footprint.weights == counted.pop("weights") + sum(buffer.nbytes for buffer in model.buffers())
    assert {name: getattr(planned.footprint, name) for name in counted} == counted
    optimizer.zero_grad()
    check(planned, lambda: loss.loss(model, batches, sparse)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["selected units", "all weights"])
def test_the_peak_on_a_gpu(name, make_small, make_plan):
    """What the caching allocator of CUDA reports for a step, to 10 %."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 8000, "num_attention_heads": 8, "layers": 8}
    model = make_small(BFLOAT16, **sizes)
    settings = {"batch_size": 8, "max_length": 256, "answer_tokens": 200, "objective": "undial"}
    planned = of(make_plan(model, ["all weights"], **settings), name).footprint
    model.cuda()
    sets = {}
    for group, number in (("forget", 8), ("retain", 16)):
        ids = torch.randint(3, 8000, (number, 256), device="cuda")
        labels, mask = ids.clone(), torch.ones_like(ids)
        labels[:, :56], mask[0, :2] = -100, 0
        sets[group] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    loss, trained = get_objective("undial"), Original(model)
    if name == "selected units":
        trained = sparsify(model, selection_of(model))
        clue_fast.patch(model)
        optimizer = SparseAdamW(model)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        loss.loss(model, sets, trained)[0].backward()
        optimizer.step()
    found = planned.peak - planned.reference
    assert found == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
