"""Both rules wherever the tensors lie, however many there are, and with gradients that are no numbers."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

from clue_fast.ops import sparse_sgd_
from tests.ops.slices import (
    BETAS,
    DTYPES,
    Layer,
    bits,
    gradients,
    in_float64,
    layer,
    outside,
    step,
    stochastic_step,
    to,
)

OPERATOR = "sparse_optimizer"
SHAPES = [(33, 64), (31, 67), (130, 72)]  # rows of whole vectors, of none, and several blocks


def shifted(tensor: Tensor, by: int) -> Tensor:
    """The same numbers in memory that begins so many of them behind an aligned address."""
    flat = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=tensor.device)[by:]
    return flat.copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("by", [1, 2])
@pytest.mark.parametrize("moved", ["weight", "value", "exp_avg", "exp_avg_sq", "grad"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masters", [True, False])
def test_an_address_changes_no_bit(
    backend: str, device: torch.device, masters: bool, dtype: torch.dtype, moved: str, by: int
) -> None:
    """Vectors are read and written only where they may be."""
    aligned = to([layer(shape, dim, 9, dtype) for shape in SHAPES for dim in (0, 1)], device)
    others = copy.deepcopy(aligned)
    grads = gradients(aligned, 0)
    if moved != "grad":
        for one in others:
            setattr(one, moved, shifted(getattr(one, moved), by))
    for mine, given in ((aligned, grads), (others, [shifted(g, by) for g in grads] if moved == "grad" else grads)):
        update(mine, backend, masters, given)
    for a, b in zip(aligned, others, strict=True):
        for name in ("weight", "value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(bits(getattr(a, name)), bits(getattr(b, name))), name


def update(layers: list[Layer], backend: str, masters: bool, grads: list[Tensor]) -> None:
    """One step of AdamW."""
    if masters:
        step(layers, backend, grads=grads)
    else:
        stochastic_step(layers, backend, grads)


def test_more_weights_than_one_launch_takes(backend: str, device: torch.device) -> None:
    """A kernel of CUDA 13 takes 290 parts."""
    mine = to([layer((3, 5), number % 2, 2, torch.bfloat16, lr=1e-3 * number) for number in range(600)], device)
    expected, before = in_float64(mine, 1), [outside(one) for one in mine]
    step(mine, backend, seed=1)
    for one, exact, rest in zip(mine, expected, before, strict=True):
        assert torch.allclose(one.value.cpu().double(), exact["value"], rtol=1e-6, atol=1e-7)
        assert torch.equal(outside(one), rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masters", [True, False])
def test_a_gradient_that_is_no_number_stays_where_it_is(
    backend: str, device: torch.device, dtype: torch.dtype, masters: bool
) -> None:
    """Nothing else of the selected part is other than without it, and nothing outside."""
    mine = to([layer((9, 70), dim, 5, dtype) for dim in (0, 1)], device)
    finite = copy.deepcopy(mine)
    before, grads = [outside(one) for one in mine], gradients(mine, 0)
    bad = [grad.clone() for grad in grads]
    for grad in bad:
        positions = range(0, grad.numel(), grad.numel() // 7)
        for position, number in zip(positions, itertools.cycle((math.inf, -math.inf, math.nan))):
            grad.view(-1)[position] = number
    update(mine, backend, masters, bad)
    update(finite, backend, masters, grads)
    for a, b, grad, rest in zip(mine, finite, bad, before, strict=True):
        fine = grad.isfinite()
        assert (~fine).sum() >= 7
        found, expected = (a.value, b.value) if masters else (a.selected(), b.selected())
        assert found[~fine].isnan().all() and torch.equal(bits(found[fine]), bits(expected[fine]))
        assert torch.equal(a.exp_avg[~fine].nan_to_num(1.0), (grad[~fine] * (1 - BETAS[0])).nan_to_num(1.0))
        assert torch.equal(outside(a), rest)


def test_sgd_takes_an_infinite_gradient(backend: str, device: torch.device) -> None:
    value, index = torch.ones(2, 5, device=device), torch.tensor([1, 3], device=device)
    weight, grad = torch.ones(4, 5, device=device), torch.zeros(2, 5, device=device)
    grad[0, 0], grad[1, 4], grad[1, 0] = math.inf, -math.inf, math.nan
    numbers = [torch.tensor([x], dtype=torch.float64) for x in (0.5, 0.0)]
    sparse_sgd_([value], [grad], None, [weight], [index], [0], *numbers, torch.tensor([1]), backend=backend)
    expected = torch.ones(4, 5)
    expected[1, 0], expected[3, 4], expected[3, 0] = -math.inf, math.inf, math.nan
    assert torch.equal(weight.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(weight.cpu()[index.cpu()].nan_to_num(7.0), value.cpu().nan_to_num(7.0))
