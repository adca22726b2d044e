"""Scores of all units of a model in one launch, against the same formulas in PyTorch, all sites at once."""

from __future__ import annotations

import pytest
import torch

from bench import machine
from bench.interleaved import Case, Comparison, Target
from clue_fast import ops

# The MLP channels of models of 1B and 8B parameters.
SHAPES = {"16 sites of 8192": (16, 8192), "32 sites of 14336": (32, 14336)}


def cases(shape: str, criterion: str) -> dict[str, Case]:
    """Eager is the reference backend, which is the definition."""
    sites, width = SHAPES[shape]
    units = sites * width
    statistics = torch.rand(2, 5, units, dtype=torch.float64, device=machine.device()) * 1000
    gradients = torch.rand(2, 3, units, dtype=torch.float64, device=machine.device())
    count = torch.full((2, sites), 1000, device=machine.device())
    offsets = torch.arange(sites + 1, device=machine.device()) * width

    def score(backend: str | None) -> Case:
        return lambda: ops.conflict_score(
            statistics, count, offsets, criterion, gradient_statistics=gradients, backend=backend
        )

    return {"conflict_score": score(None), "eager": score("reference")}


def title(shape: str, criterion: str) -> str:
    return f"conflict_score, {criterion}, {shape}"


@pytest.mark.parametrize("criterion", ops.CRITERIA_OPS)
@pytest.mark.parametrize("shape", SHAPES)
def bench_conflict_score(compare, shape: str, criterion: str) -> None:
    targets = [Target("conflict_score", "eager", 1.0)]
    compare(Comparison(title(shape, criterion), cases(shape, criterion), targets, seconds=5.0))
