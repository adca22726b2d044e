"""Stages: which units train on which objective, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from clue_fast.errors import SelectionError, UnknownNameError
from clue_fast.selection import CATEGORIES, Selection
from clue_fast.training.objectives import Objective, get_objective
from clue_fast.training.parts import TRAINED

UNITS = tuple(CATEGORIES[category] for category in TRAINED)


@dataclass(frozen=True)
class Stage:
    """A part of a training, some epochs long.

    Attributes:
        units: the categories of units that train, of "forget" and "conflict".
        objective: what they train on, by its name or as an ``Objective``.
        epochs: passes over the forget set.
    """

    units: tuple[str, ...]
    objective: str | Objective
    epochs: int

    def __post_init__(self) -> None:
        for unit in self.units:
            if unit not in UNITS:
                raise UnknownNameError("category of units", unit, UNITS)
        if self.epochs < 1:
            raise ValueError(f"a stage of {self.epochs} epochs; it needs at least one")
        object.__setattr__(self, "objective", get_objective(self.objective))


def clue_stages(objective: Objective) -> tuple[Stage, ...]:
    """The published schedule of CLUE: forget units on the forget loss for one epoch, then conflict units on both."""
    return (
        Stage(("forget",), replace(objective, retain_weight=0.0), epochs=1),
        Stage(("conflict",), objective, epochs=5),
    )


SCHEDULES = {"clue": clue_stages}


def get_stages(stages: str | Sequence[Stage], objective: Objective, selection: Selection) -> tuple[Stage, ...]:
    """Returns the stages of a training, by the name of a schedule or as they are given.

    Args:
        stages: "clue", or the stages.
        objective: for schedules that are given by name.
        selection: must have units to train in every stage.

    Raises:
        UnknownNameError: no schedule has that name.
        SelectionError: a stage has no unit to train.
        ValueError: there is no stage.
    """
    if isinstance(stages, str):
        if stages not in SCHEDULES:
            raise UnknownNameError("schedule of stages", stages, SCHEDULES)
        stages = SCHEDULES[stages](objective)
    if not stages:
        raise ValueError("a training without stages; give at least one, or None for the whole selection at once")
    present = {CATEGORIES[c] for values in selection.categories.values() for c in set(values.tolist())}
    for number, stage in enumerate(stages, start=1):
        if not present & set(stage.units):
            raise SelectionError(
                f"stage {number} trains {' and '.join(stage.units)} units, the selection has none; "
                "localize with a criterion that tells them apart, or leave the stage out"
            )
    return tuple(stages)


def stage_at(stages: Sequence[Stage], epoch: int) -> int:
    """Returns the number of the stage that an epoch belongs to, from 0; the last one goes on for ever."""
    ends = accumulate(stage.epochs for stage in stages)
    return next((number for number, end in enumerate(ends) if epoch < end), len(stages) - 1)
