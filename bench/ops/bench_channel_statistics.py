"""Statistics of a tensor, against PyTorch's own sums and against reading the tensor once.

`copy` is one pass of reading and writing: what memory allows.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.interleaved import Case, Comparison, Target
from bench.ops.bench_gated_activation import CHANNELS, activations, collect, groups, tokens
from clue_fast import ops

DTYPES = [torch.float32, torch.bfloat16]


def cases(dtype: torch.dtype) -> dict[str, Case]:
    """All on the same tensor; eager collects one group."""
    x = activations(dtype)
    out = torch.empty_like(x)
    statistics, sums = (torch.zeros(*n, 5, CHANNELS, dtype=torch.float64, device=x.device) for n in ([2], []))
    one, records = groups(x.device)
    return {
        "statistics": lambda: ops.channel_statistics(x, one, statistics),
        "statistics, two groups": lambda: ops.channel_statistics(x, records, statistics),
        "eager": lambda: collect(x, sums),
        "copy": lambda: out.copy_(x),
    }


def attribution_cases(dtype: torch.dtype) -> dict[str, Case]:
    """Products with the gradient; eager collects one group."""
    x, grad = activations(dtype), activations(dtype)
    group, _ = groups(x.device)
    attribution, sums = (torch.zeros(*n, 3, CHANNELS, dtype=torch.float64, device=x.device) for n in ([2], []))

    def eager(x: Tensor, grad: Tensor) -> None:
        product = x.float() * grad.float()
        sums[0] += product.sum(0)
        sums[1] += product.abs().sum(0)
        sums[2] += product.square().sum(0)

    return {
        "attribution": lambda: ops.channel_attribution(x, grad, group, attribution),
        "eager": lambda: eager(x, grad),
    }


def title(name: str, dtype: torch.dtype) -> str:
    return f"{name}, {tokens()} x {CHANNELS}, {str(dtype)[6:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def bench_statistics(compare, dtype: torch.dtype) -> None:
    """A copy moves twice the bytes; near the memory's speed the statistics take no longer than it."""
    targets = [Target("statistics", "copy", 1.0), Target("statistics", "eager", 1.0)]
    compare(Comparison(title("channel_statistics", dtype), cases(dtype), targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def bench_attribution(compare, dtype: torch.dtype) -> None:
    targets = [Target("attribution", "eager", 1.0)]
    compare(Comparison(title("channel_attribution", dtype), attribution_cases(dtype), targets))
