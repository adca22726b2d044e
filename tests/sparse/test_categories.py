"""The forget loss reaches forget and conflict units, the retain loss conflict units only."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from clue_fast.errors import SparseError
from clue_fast.objectives import GradientAscent, GradientDifference
from clue_fast.sparse import sparsify
from clue_fast.sparse.slices import BatchLayout, ForwardPass


def dense_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean over records of the mean loss over labels, by autograd on all weights, record by record."""
    model.zero_grad()
    for record in range(len(batch["labels"])):
        alone = {name: tensor[record : record + 1] for name, tensor in batch.items()}
        (model(**alone).loss / len(batch["labels"])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(params=[None, False, True], ids=["plain", "checkpointing", "reentrant"])
def checkpointing(request: pytest.FixtureRequest) -> Any:
    """checkpointing(model) turns gradient checkpointing on, or not."""

    def enable(model: Any) -> None:
        model.train()
        if request.param is not None:
            model.gradient_checkpointing_enable({"use_reentrant": request.param})
        if request.param:
            model.enable_input_require_grads()

    return enable


def test_each_loss_reaches_its_units(checkpointing, make_model, make_selection, make_batch):
    """In one backward of a mixed batch; against the gradients of each loss alone, to the rounding of float32."""
    model, batches = make_model(), {"forget": make_batch(3, seed=1), "retain": make_batch(4, seed=2)}
    dense = copy.deepcopy(model)
    forget, retain = (dense_gradients(dense, batches[side]) for side in ("forget", "retain"))
    sparse = sparsify(model, make_selection(model, units=5, forget=4))
    assert sorted({(part.category, len(part.index)) for part in sparse.slices}) == [("conflict", 5), ("forget", 4)]
    checkpointing(model)
    GradientDifference(retain_weight=0.7).loss(model, batches, sparse)[0].backward()
    for part in sparse.slices:
        reached = 0.7 * retain[part.path] if part.category == "conflict" else 0.0
        expected = (reached - forget[part.path]).index_select(part.dim, part.index)
        assert (part.values.grad - expected).norm() < 1e-5 * expected.norm(), part


@pytest.mark.slow
def test_compiled(make_model, make_selection, make_batch):
    """In one graph, with the gradients of the plain model."""
    model, batches = make_model(layers=2), {"forget": make_batch(3, seed=1), "retain": make_batch(4, seed=2)}
    sparse = sparsify(model, make_selection(model, units=5, forget=4))
    GradientDifference().loss(model, batches, sparse)[0].backward()
    expected = [p.grad.clone() for p in sparse.trainable_parameters]
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager", fullgraph=True)
    GradientDifference().loss(model, batches, sparse)[0].backward()
    for one, p in zip(expected, sparse.trainable_parameters, strict=True):
        torch.testing.assert_close(p.grad, one)


def test_a_pass_that_is_not_announced_reaches_all(make_model, make_selection, make_batch):
    """As in a stock Trainer; also after a pass that was announced, and after one that was not run."""
    model, batch = make_model(), make_batch(3)
    expected = dense_gradients(copy.deepcopy(model), batch)
    sparse = sparsify(model, make_selection(model, units=2, forget=3))
    GradientDifference().loss(model, {"forget": batch, "retain": batch}, sparse)[0].backward()
    sparse.set_batch_layout(0, 1, 1)
    model(**make_batch(1))
    model.zero_grad()
    GradientAscent().loss(model, {"forget": batch}, sparse)[0].backward()
    for part in sparse.slices:
        found = -expected[part.path].index_select(part.dim, part.index)
        assert (part.values.grad - found).norm() < 1e-5 * found.norm(), part


def test_only_forget_units(make_model, make_selection, make_batch):
    """The retain loss then trains nothing at all."""
    model, batches = make_model(), {"forget": make_batch(3, seed=1), "retain": make_batch(4, seed=2)}
    twin = copy.deepcopy(model)
    sparse, other = (sparsify(m, make_selection(m, units=0, forget=4)) for m in (model, twin))
    GradientDifference(retain_weight=100.0).loss(model, batches, sparse)[0].backward()
    GradientAscent().loss(twin, {"forget": batches["forget"]}, other)[0].backward()
    for one, two in zip(sparse.trainable_parameters, other.trainable_parameters, strict=True):
        assert (one.grad - two.grad).norm() < 1e-5 * two.grad.norm()


def test_retain_records_alone_leave_forget_units_alone(make_model, make_selection, make_batch):
    model, batch = make_model(), make_batch(3)
    sparse = sparsify(model, make_selection(model, units=2, forget=3))
    sparse.set_batch_layout(0, 3, batch["input_ids"].shape[1])
    model(**batch).loss.backward()
    assert {(part.category, part.values.grad is None) for part in sparse.slices} == {
        ("conflict", False),
        ("forget", True),
    }


def test_the_hook_goes_with_restore(make_model, make_selection):
    model = make_model()
    with sparsify(model, make_selection(model, forget=2)):
        assert len(model._forward_pre_hooks) == 1
    assert not model._forward_pre_hooks
    with sparsify(model, make_selection(model)):
        assert not model._forward_pre_hooks


def test_rows_of_a_pass():
    layout = BatchLayout(2, 5, 7)
    assert layout.forget_rows(torch.zeros(5, 7, 3), "x") == 2
    assert layout.forget_rows(torch.zeros(5, 4, 3), "x") == 2  # the tokens of an encoder
    assert layout.forget_rows(torch.zeros(35, 3), "x") == 14  # flattened
    for odd in (torch.zeros(6, 7, 3), torch.zeros(34, 3), torch.zeros(5, 3)):
        with pytest.raises(SparseError, match=r"layers\.0 is .* 5 records of 7 tokens"):
            layout.forget_rows(odd, "layers.0")
    forward_pass = ForwardPass(next=layout)
    assert forward_pass.layout is None
    for expected in (layout, None):
        forward_pass.begin()
        assert forward_pass.layout is expected


def test_a_stage_runs_no_backward_below_its_lowest_unit(make_model, make_selection, make_batch):
    model, batches = make_model(layers=4), {"forget": make_batch(seed=1), "retain": make_batch(seed=2)}
    selection = make_selection(model, units=3, layers=[1], forget=2)
    other = make_selection(model, units=3, layers=[3])
    for site in selection.sites:
        selection.categories[site] = torch.maximum(selection.categories[site], other.categories[site])
    sparse = sparsify(model, selection)
    reached: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: reached.append(out.requires_grad))
    for part in sparse.slices:  # as if the units of layer 1 were all forget units
        part.category = "forget" if part.layer == 1 else "conflict"
    sparse.train_only("conflict")
    GradientDifference().loss(model, batches, sparse)[0].backward()
    assert reached == [False, False, False, True]
    assert {part.layer for part in sparse.slices if part.values.grad is not None} == {3}
