"""scale_update: how much of an update is kept, and what the weights then are."""

from __future__ import annotations

import pytest
import torch

from clue_fast.sparse import SparseAdamW, changed_outside, snapshot, sparsify
from clue_fast.trainer import scale_update


@pytest.fixture(params=[(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def trained(request, make_model, make_selection, make_batch):
    """A sparse model some steps on, with its selection, its weights before, and its weights now."""
    dtype, stochastic = request.param
    model = make_model(dtype)
    selection, before = make_selection(model), snapshot(model)
    sparse = sparsify(model, selection)
    optimizer = SparseAdamW(model, lr=3e-2, master_weights=not stochastic, stochastic_rounding=stochastic)
    for seed in range(4):
        model(**make_batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparse, selection, before, snapshot(model)


def moved(sparse, before) -> float:
    """How far the weights are from where they were."""
    now = snapshot(sparse.model)
    return sum(float((now[name].float() - value.float()).square().sum()) for name, value in before.items()) ** 0.5


@pytest.mark.parametrize("needed", [0.3, 0.7])
def test_keeps_the_smallest_share_that_is_enough(needed, trained):
    sparse, selection, before, _ = trained
    whole = moved(sparse, before)
    share = scale_update(sparse, lambda: moved(sparse, before) >= needed * whole, steps=6)
    assert needed - 0.01 < share < needed + 2**-6 + 0.01  # 0.01 for weights in bfloat16
    assert needed * whole <= moved(sparse, before) < (share + 0.01) * whole
    assert changed_outside(before, sparse.model, selection) == 0
    for part in sparse.slices:
        if part.has_values:
            assert torch.equal(part.values.to(part.original.dtype), part.read())


@pytest.mark.parametrize("steps", [0, 5])
def test_keeps_all_bits_if_nothing_less_or_nothing_at_all_is_enough(steps, trained):
    sparse, _, before, after = trained
    whole = moved(sparse, before)
    for enough in (lambda: moved(sparse, before) >= whole, lambda: False):
        assert scale_update(sparse, enough, steps) == 1.0
        assert all(torch.equal(value, after[name]) for name, value in snapshot(sparse.model).items())
