"""Recording with the scores of all units written in the same launch, against recording alone.

Two groups, since scores compare two, in records of 64 tokens. `two launches` records, and scores all units afterwards.
"""

from __future__ import annotations

import pytest
import torch

from bench import machine
from bench.interleaved import Case, Comparison, Target
from clue_fast import ops
from clue_fast.ops import Scoring

CHANNELS = 4096
TOKENS = [1024, 4096]
DTYPES = [torch.float32, torch.bfloat16]
OPERATORS = ("gated_activation", "channel_statistics")


def cases(operator: str, tokens: int, dtype: torch.dtype, criterion: str = "difference") -> dict[str, Case]:
    """Forward, without autograd, each on accumulators of its own."""
    device = machine.device()
    gate, up = (torch.randn(tokens, CHANNELS, device=device).to(dtype) for _ in range(2))
    group = torch.randint(0, 3, (tokens // 64,), dtype=torch.int8, device=device).repeat_interleave(64)
    count, offsets = torch.full((2, 1), tokens, device=device), torch.tensor([0, CHANNELS], device=device)
    scores = torch.empty(CHANNELS, device=device)
    alone, together, apart = torch.zeros(3, 2, 5, CHANNELS, dtype=torch.float64, device=device)

    def record(statistics: torch.Tensor, scoring: Scoring | None = None) -> None:
        if operator == "gated_activation":
            ops.gated_activation(gate, up, "silu", group=group, statistics=statistics, scoring=scoring)
        else:
            ops.channel_statistics(gate, group, statistics, scoring=scoring)

    def record_and_score() -> None:
        record(apart)
        ops.conflict_score(apart, count, offsets, criterion)

    return {
        "recording": lambda: record(alone),
        "with scores": lambda: record(together, Scoring(criterion, count, None, scores)),
        "two launches": record_and_score,
    }


def title(operator: str, tokens: int, dtype: torch.dtype) -> str:
    return f"{operator} with scores, {tokens} x {CHANNELS}, {str(dtype)[6:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("operator", OPERATORS)
def bench_scoring(compare, operator: str, tokens: int, dtype: torch.dtype) -> None:
    targets = [Target("with scores", "recording", 1.01)]
    with torch.no_grad():
        compare(Comparison(title(operator, tokens, dtype), cases(operator, tokens, dtype), targets))
