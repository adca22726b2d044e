"""AdamW on 5 % of the rows or columns of several layers, against torch's fused AdamW on the whole of them.

Sizes are those of gate, up and down of a few Llama layers, more than the caches hold; the selection is random and
sorted, as a criterion gives it, not a block. Other memory is walked through before each step, as the next forward and
backward would, so that nothing is timed in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

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
TARGETS = {"rows": 1 / 15, "columns": 1 / 8}
CASES = ("whole", "selected", "stochastic")
BETAS, EPS, LR, DECAY = (0.9, 0.999), 1e-8, 1e-5, 0.1


def whole(weights: list[Tensor]) -> Case:
    """Every weight, moments in its dtype, by torch."""
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True).step


def selected(weights: list[Tensor], dim: int, master: str) -> Case:
    """The selected part, with masters in float32 or without any, in the 20th step."""
    size = weights[0].shape[dim]
    indices = [torch.randperm(size)[: round(size * FRACTION)].sort().values for _ in weights]
    values = [weight.index_select(dim, index).float() for weight, index in zip(weights, indices, strict=True)]
    grads = [torch.randn_like(value) for value in values]
    moments = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    lr, decay = (torch.full((len(weights),), number, dtype=torch.float64) for number in (LR, DECAY))
    step = torch.full((len(weights),), 20)
    seed = torch.arange(len(weights)) if master == "stochastic" else None
    kept = None if master == "stochastic" else values
    dims = [dim] * len(weights)
    return lambda: ops.sparse_adamw_(
        kept, grads, *moments, weights, indices, dims, lr, decay, step, BETAS, EPS, seed=seed
    )


def cases(part: str, dtype: torch.dtype) -> dict[str, Case]:
    """Both sides on the same weights."""
    shape, dim = SHAPES[part], ("rows", "columns").index(part)
    weights = [torch.randn(shape.rows, shape.columns).to(dtype) for _ in range(shape.weights)]
    return {
        "whole": whole(weights),
        "selected": selected(weights, dim, "fp32"),
        "stochastic": selected(weights, dim, "stochastic"),
    }


def title(part: str, dtype: torch.dtype) -> str:
    return f"AdamW, {FRACTION:.0%} of the {part}, {SHAPES[part]}, {str(dtype)[6:]}"


def comparisons() -> Iterator[Comparison]:
    """Rows and columns in every dtype, with what DESIGN.md asks for."""
    for part, at_most in TARGETS.items():
        for dtype in DTYPES:
            sides = cases(part, dtype)
            yield Comparison(title(part, dtype), sides, [Target("selected", "whole", at_most)])


def evict() -> Callable[[], None]:
    """Walks through as much memory as a step of training would."""
    other = torch.zeros(48 * 2**20)
    return lambda: other.add_(1.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", SHAPES)
def bench_sparse_adamw(benchmark, part: str, dtype: torch.dtype, case: str) -> None:
    benchmark.group = title(part, dtype)
    walk = evict()
    benchmark.pedantic(cases(part, dtype)[case], setup=walk, rounds=20, warmup_rounds=2)
