"""expert_linear: rows times the matrices of their experts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue_fast.ops.expert_linear import expert_linear


def draw(counts: list[int], inputs: int, outputs: int, transposed: bool) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(sum(counts), inputs, dtype=torch.float64, requires_grad=True)
    shape = (inputs, outputs) if transposed else (outputs, inputs)
    weight = torch.randn(len(counts), *shape, dtype=torch.float64, requires_grad=True)
    return x, weight, torch.tensor([0, *counts]).cumsum(0)


def definition(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    expert = torch.bucketize(torch.arange(len(x)), bounds[1:], right=True)
    return torch.einsum("ni,nio->no" if transposed else "ni,noi->no", x, weight[expert])


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    transposed=st.booleans(),
)
def test_it_is_its_definition(counts: list[int], inputs: int, outputs: int, transposed: bool) -> None:
    x, weight, bounds = draw(counts, inputs, outputs, transposed)
    found, expected = (f(x, weight, bounds, transposed) for f in (expert_linear, definition))
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, (x, weight), grad) for y in (found, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_compile(transposed: bool) -> None:
    arguments = (*draw([2, 0, 3], 4, 3, transposed), transposed)
    found = torch.compile(expert_linear, fullgraph=True, backend="aot_eager")(*arguments)
    torch.testing.assert_close(found, definition(*arguments))
    gradients = [torch.autograd.grad(y.square().sum(), arguments[:2]) for y in (found, definition(*arguments))]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.compiler.reset()


def test_the_operator_is_well_defined() -> None:
    x, weight, bounds = draw([2, 1], 4, 3, False)
    torch.library.opcheck(torch.ops.clue_fast.expert_linear, (x, weight, bounds, False))
