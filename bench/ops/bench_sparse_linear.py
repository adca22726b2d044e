"""The weight gradient of 5 % of the rows or columns of a linear layer, against the whole one.

"torch" gathers with index_select and multiplies in the dtype of the activations, which rounds a 16-bit gradient to 16
bits; ours is accumulated and returned in float32. The columns of x are gathered in the forward, so there that is timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from bench.interleaved import Case, Comparison, Target
from clue_fast.ops import backend as backends
from clue_fast.ops.backend import Launch

FRACTION = 0.05


@dataclass(frozen=True)
class Shape:
    """tokens, and features in and out."""

    tokens: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.tokens} tokens, {self.inputs} to {self.outputs} features"


SHAPES = [Shape(2048, 1024, 4096), Shape(128, 1024, 4096)]
PARTS = ("rows", "columns")
DTYPES = [torch.float32, torch.bfloat16]
CASES = ("whole", "torch", "ours")


def launch(name: str) -> Launch:
    return backends.launch("sparse_linear", name, torch.device("cpu"), None)


def cases(shape: Shape, part: str, dtype: torch.dtype) -> dict[str, Case]:
    """All on the same x and gradient of the output."""
    features = (shape.outputs, shape.inputs) if part == "rows" else (shape.inputs, shape.outputs)
    grad, x = (torch.randn(shape.tokens, size).to(dtype) for size in features)
    source = grad if part == "rows" else x
    index = torch.randperm(shape.outputs)[: round(shape.outputs * FRACTION)].sort().values
    gather, multiply = launch("sparse_linear_gather"), launch("sparse_linear_backward")

    def torchs() -> None:
        kept = source.index_select(1, index)
        torch.mm(kept.t(), x) if part == "rows" else torch.mm(grad.t(), kept)

    def ours() -> None:
        if part == "rows":
            multiply(grad, x, index, torch.empty(len(index), x.shape[1]))
            return
        kept = x.new_empty(shape.tokens, len(index))
        gather(x, index, kept)
        multiply(grad, kept, None, torch.empty(grad.shape[1], len(index)))

    return {"whole": lambda: torch.mm(grad.t(), x), "torch": torchs, "ours": ours}


def title(shape: Shape, part: str, dtype: torch.dtype) -> str:
    return f"weight gradient, {FRACTION:.0%} of the {part}, {shape}, {str(dtype)[6:]}"


def comparisons() -> Iterator[Comparison]:
    """Every shape, part and dtype; the gather should leave room for a tenth of the whole product and less."""
    for shape in SHAPES:
        for part in PARTS:
            for dtype in DTYPES:
                targets = [Target("ours", "whole", 1 / 10), Target("ours", "torch", 1.0)]
                yield Comparison(title(shape, part, dtype), cases(shape, part, dtype), targets, seconds=5.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sparse_linear(benchmark, shape: Shape, part: str, dtype: torch.dtype, case: str) -> None:
    benchmark.group = title(shape, part, dtype)
    benchmark(cases(shape, part, dtype)[case])
