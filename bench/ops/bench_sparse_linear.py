"""Gradient of 5 % of the rows or columns of a weight, against that of the whole and against gathering with PyTorch."""

from __future__ import annotations

import pytest
import torch

from bench import machine
from bench.interleaved import Case, Comparison, Target
from clue_fast import ops

TOKENS, FEATURES, UNITS, FRACTION = 2048, 1024, 4096, 0.05
DTYPES = [torch.float32, torch.bfloat16]


def cases(part: str, dtype: torch.dtype) -> dict[str, Case]:
    """Backward of the same layer three ways: rows of [units, features], columns of [features, units].

    On a GPU once more in Triton, which is not what NVIDIA's run by themselves.
    """
    dim = ("rows", "columns").index(part)
    rows, columns = (UNITS, FEATURES) if part == "rows" else (FEATURES, UNITS)
    shapes = (rows, columns), (TOKENS, columns), (TOKENS, rows)
    weight, x, grad = (torch.randn(shape, device=machine.device()).to(dtype) for shape in shapes)
    index = torch.randperm(UNITS, device=machine.device())[: round(UNITS * FRACTION)].sort().values
    values = weight.index_select(dim, index).float().requires_grad_()
    dense = weight.clone().requires_grad_()
    backends = {"selected": None} | ({"selected, Triton": "triton"} if machine.on_gpu() else {})
    ours = {
        name: ops.sparse_linear(x, weight, None, values, index, dim, backend=backend)
        for name, backend in backends.items()
    }
    stock = torch.nn.functional.linear(x, dense)

    def gathered() -> torch.Tensor:
        if part == "rows":
            return (grad.index_select(1, index).t() @ x).float()
        return (grad.t() @ x.index_select(1, index)).float()

    def selected(name: str) -> Case:
        return lambda: torch.autograd.grad(ours[name], values, grad, retain_graph=True)

    return {name: selected(name) for name in ours} | {
        "gathered": gathered,
        "dense": lambda: torch.autograd.grad(stock, dense, grad, retain_graph=True),
    }


def title(part: str, dtype: torch.dtype) -> str:
    return f"gradient of {FRACTION:.0%} of the {part}, {TOKENS} tokens, {FEATURES} x {UNITS}, {str(dtype)[6:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", ("rows", "columns"))
def bench_sparse_linear(compare, part: str, dtype: torch.dtype) -> None:
    compare(Comparison(title(part, dtype), cases(part, dtype), [Target("selected", "dense", 0.2)]))
