"""The comparison with torch.optim.AdamW notices every way in which an update could be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from clue_fast import ops
from clue_fast.sparse import SparseAdamW, changed_outside, snapshot, sparsify

STEPS, LR, LAYER_LR, DECAY = 8, 1e-3, 0.25, 0.1


def compare(model: Any, selection: Any, batch: dict[str, Tensor]) -> None:
    """Trains selected units, and the dense weights with torch under a mask; asserts that they agree."""
    dense, before = copy.deepcopy(model), snapshot(model)
    sparse = sparsify(model, selection)
    optimizer = SparseAdamW(model, lr=LR, weight_decay=DECAY, layer_lr=LAYER_LR)
    start = {part.path: dense.get_parameter(part.path).detach().clone() for part in sparse.slices}
    groups = [
        {"params": [dense.get_parameter(part.path)], "lr": LR * LAYER_LR ** (part.layer / 2)} for part in sparse.slices
    ]
    reference = torch.optim.AdamW(groups, weight_decay=DECAY)
    for _ in range(STEPS):
        for one, chosen in ((model, optimizer), (dense, reference)):
            one.zero_grad()
            one(**batch).loss.backward()
            chosen.step()
        with torch.no_grad():
            for part in sparse.slices:
                weight = dense.get_parameter(part.path)
                kept = weight.index_select(part.dim, part.index)
                weight.copy_(start[part.path]).index_copy_(part.dim, part.index, kept)
    for part in sparse.slices:
        expected = dense.get_parameter(part.path).index_select(part.dim, part.index)
        moved = (part.read() - part.original, expected - part.original)
        assert (moved[0] - moved[1]).norm() < 1e-3 * moved[1].norm(), part.path
        assert (part.read() - expected).norm() < 1e-6 * expected.norm(), part.path
    assert changed_outside(before, model, selection) == 0


def mutated(change: Callable[[dict[str, Any]], None]) -> Callable[..., None]:
    """The operator with some of its arguments changed."""
    names = ("values", "grads", "exp_avgs", "exp_avg_sqs", "weights", "indices", "dims", "lr", "weight_decay", "step")

    def run(*arguments: Any, **options: Any) -> None:
        given = dict(zip((*names, "betas", "eps"), arguments, strict=True))
        change(given)
        sparse_adamw_(*given.values(), **options)

    return run


def moved_outside(given: dict[str, Any]) -> None:
    """Decays all of a weight, as a mask on the gradient alone does."""
    given["weights"][0].mul_(1 - LR * DECAY)


sparse_adamw_ = ops.sparse_adamw_
MUTATIONS: dict[str, Callable[..., None]] = {
    "no update": lambda *_, **__: None,
    "wrong sign": mutated(lambda given: given.update(grads=[-grad for grad in given["grads"]])),
    "ignored mask": mutated(moved_outside),
    "ignored layer rate": mutated(lambda given: given.update(lr=torch.full_like(given["lr"], LR))),
    "ignored decay": mutated(lambda given: given.update(weight_decay=torch.zeros_like(given["weight_decay"]))),
    "no bias correction": mutated(lambda given: given.update(step=torch.full_like(given["step"], 10**6))),
    "shifted units": mutated(lambda given: given.update(indices=[(index + 1) % 48 for index in given["indices"]])),
    "forgotten momentum": mutated(lambda given: [moment.zero_() for moment in given["exp_avgs"]]),
    "one tensor left out": mutated(lambda given: given["grads"][0].zero_()),
}


def test_the_operator_itself_agrees(make_model, make_selection, make_batch):
    model = make_model()
    compare(model, make_selection(model), make_batch())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_is_noticed(mutation, make_model, make_selection, make_batch, monkeypatch):
    model = make_model()
    selection = make_selection(model)
    monkeypatch.setattr(ops, "sparse_adamw_", MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        compare(model, selection, make_batch())
