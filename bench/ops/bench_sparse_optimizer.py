"""AdamW on 5 % of the rows or columns of several layers, against torch's fused AdamW on the whole of them.

Sizes are those of gate, up and down of a few Llama layers; the selection is random and sorted, as a criterion gives it,
not a block. Nothing is timed in the cache, where a forward and a backward would not leave it either: the step over the
whole weights, which has its turn in each round, walks through more than the caches hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench import machine
from bench.interleaved import Case, Comparison, Target
from clue_fast import ops


@dataclass(frozen=True)
class Shape:
    """weights x rows x columns."""

    weights: int
    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.weights} weights of {self.rows} x {self.columns}"


FRACTION = 0.05
# 58 M and 46 M parameters: rows are taken of gate and up, columns of down.
SHAPES = {"rows": Shape(20, 2816, 1024), "columns": Shape(16, 1024, 2816)}
DTYPES = [torch.float32, torch.bfloat16]
TARGETS = {"rows": 1 / 15, "columns": 1 / 15}
BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-5, 0.1


def whole(weights: list[Tensor]) -> Case:
    """Every weight, by torch, with gradients and moments in the dtype of the weights."""
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True).step


def whole_with_masters(weights: list[Tensor]) -> Case:
    """Every weight, by torch, with float32 masters, gradients and moments, as the selected part has them."""
    masters = [weight.float() for weight in weights]
    step = whole(masters)

    def case() -> None:
        step()
        torch._foreach_copy_(weights, masters)

    return case


def selected(weights: list[Tensor], dim: int, masters: bool, backend: str | None = None) -> Case:
    """The selected part, in the 20th step; without masters 16-bit weights are rounded stochastically."""
    size, count = weights[0].shape[dim], len(weights)
    indices = [torch.randperm(size, device=weight.device)[: round(size * FRACTION)].sort().values for weight in weights]
    values = [weight.index_select(dim, index).float() for weight, index in zip(weights, indices, strict=True)]
    grads = [torch.randn_like(value) for value in values]
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    numbers = [torch.full((count,), number, dtype=torch.float64) for number in (LR, DECAY)]
    numbers.append(torch.full((count,), 20))
    seed = torch.arange(count) if not masters and weights[0].dtype != torch.float32 else None
    lists = (values if masters else None, grads, *moments, weights, indices, [dim] * count)
    return lambda: ops.sparse_adamw_(*lists, *numbers, BETAS, EPS, seed=seed, backend=backend)


def cases(part: str, dtype: torch.dtype) -> dict[str, Case]:
    """All on the same weights, of the size that they have in a model."""
    shape, dim = SHAPES[part], ("rows", "columns").index(part)
    shapes = [(shape.rows, shape.columns)] * shape.weights
    weights = [torch.randn(rows, columns, device=machine.device()).mul_(0.02).to(dtype) for rows, columns in shapes]
    made = {
        "whole": whole(weights),
        "whole with masters": whole_with_masters(weights),
        "selected": selected(weights, dim, masters=dtype != torch.float32),
        "without masters": selected(weights, dim, masters=False),
    }
    if machine.on_gpu():
        made["selected, Triton"] = selected(weights, dim, masters=True, backend="triton")
    if dtype == torch.float32:  # weights are their own masters
        del made["whole with masters"], made["without masters"]
        made["with a copy"] = selected(weights, dim, masters=True)
    return made


def title(part: str, dtype: torch.dtype) -> str:
    return f"AdamW, {FRACTION:.0%} of the {part}, {SHAPES[part]}, {str(dtype)[6:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", TARGETS)
def bench_sparse_adamw(compare, part: str, dtype: torch.dtype) -> None:
    """Rows and columns in every dtype, with their targets."""
    made = cases(part, dtype)
    whole_cases = [name for name in made if name.startswith("whole")]
    ours = [name for name in made if name in ("selected", "without masters")]
    targets = [Target(case, against, TARGETS[part]) for case in ours for against in whole_cases]
    compare(Comparison(title(part, dtype), made, targets))
