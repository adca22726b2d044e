"""Which kind of subject a grid names, and how its runs are scored."""

from __future__ import annotations

from bench.unlearning.grid import Grid
from bench.unlearning.scores import FACTS, Scoring
from bench.unlearning.subjects import FactSubject, Subject
from bench.unlearning.toys import TOYS, ToySubject


def kind_of(grid: Grid) -> type[Subject]:
    """A toy if its model is one, else facts of a pretrained model."""
    return ToySubject if grid.model in TOYS else FactSubject


def scoring_of(grid: Grid) -> Scoring:
    """That of the toy, or of facts."""
    return TOYS[grid.model].scoring if grid.model in TOYS else FACTS
