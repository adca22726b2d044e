"""Stages: which units train on which objective, one after another; and the published schedules of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from clue_fast.errors import SelectionError, SettingError, UnknownNameError
from clue_fast.objectives import Objective, default_objective, get_objective
from clue_fast.selection import CATEGORIES, CONFLICT, Selection
from clue_fast.sparse.slices import TRAINED

logger = logging.getLogger(__name__)

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
            raise SettingError(f"a stage of {self.epochs} epochs; it needs at least one")
        object.__setattr__(self, "objective", get_objective(self.objective))

    def __str__(self) -> str:
        return f"{' and '.join(self.units)} units"


@dataclass(frozen=True)
class Schedule:
    """A published course of training.

    Attributes:
        name: that it is asked for by.
        source: where it was published.
        stages: makes its stages for an objective.
        settings: what else was published, by the names that ``unlearn`` has for it; ``retain_weight`` is that of an
            objective that is asked for by its name.
    """

    name: str
    source: str
    stages: Callable[[Objective], tuple[Stage, ...]]
    settings: Mapping[str, Any] = field(default_factory=dict)


def clue_stages(objective: Objective) -> tuple[Stage, ...]:
    """The stages of CLUE: forget units on the forget loss for one epoch, then conflict units on both for five."""
    return (
        Stage(("forget",), replace(objective, retain_weight=0.0), epochs=1),
        Stage(("conflict",), objective, epochs=5),
    )


PUBLISHED = {"layer_lr": 1.0, "retain_ratio": 1, "retain_weight": 1.0, "forget_target": None}
CLUE = Schedule("clue", "arXiv 2509.20977", clue_stages, PUBLISHED)
"""The published schedule of CLUE: six epochs, the first on the forget loss, the others on forget loss + 1 * retain
loss, of as many records of either set, with one learning rate for all layers; the trained weights are what comes out.

The objective is the user's: the authors' code (github.com/Zodiark-ch/CLUE, ``src/exec/unlearn_model_conlict.py`` and
``src/model/unlearn_conflict.py``) offers several for each stage, with gradient ascent, other answers and NPO among
them. So is the learning rate: theirs is 1e-5, constant, with a weight decay of 0.1 and 4 records per step, for a model
of 7B parameters, and trains next to nothing in a small one. Their first epoch also trains the conflict nodes
(``mask_generation.py``); here it trains what the paper names, the forget nodes.
"""

SCHEDULES = {CLUE.name: CLUE}


def get_schedule(stages: str | Sequence[Stage] | None) -> Schedule | None:
    """Returns the published schedule that stages name, None where they are given or there are none.

    Raises:
        UnknownNameError: no schedule has that name.
    """
    if not isinstance(stages, str):
        return None
    if stages not in SCHEDULES:
        raise UnknownNameError("schedule of stages", stages, SCHEDULES)
    return SCHEDULES[stages]


def scheduled(name: str, given: Any, schedule: Schedule | None, default: Any) -> Any:
    """Returns a setting as it is given, else as the schedule has it, else its default."""
    if given is not None:
        return given
    return default if schedule is None else schedule.settings.get(name, default)


def scheduled_objective(objective: str | Objective | None, schedule: Schedule | None) -> Objective:
    """Returns an objective; one that is asked for by its name, or the default, has the retain weight of the schedule.

    Args:
        objective: its name, an ``Objective``, or None for the default.
        schedule: a published schedule, or None.
    """
    if isinstance(objective, Objective):
        return objective
    chosen = default_objective() if objective is None else get_objective(objective)
    if schedule is not None and "retain_weight" in schedule.settings:
        return replace(chosen, retain_weight=schedule.settings["retain_weight"])
    return chosen


def make_stages(stages: str | Sequence[Stage], objective: Objective) -> tuple[Stage, ...]:
    """Returns all stages of a training, by the name of a schedule or as they are given.

    Raises:
        UnknownNameError: no schedule has that name.
        SettingError: there is no stage.
    """
    schedule = get_schedule(stages)
    made = tuple(stages) if schedule is None else schedule.stages(objective)
    if not made:
        raise SettingError("a training without stages; give at least one, or None for the whole selection at once")
    return made  # type: ignore[return-value]


def get_stages(stages: str | Sequence[Stage], objective: Objective, selection: Selection) -> tuple[Stage, ...]:
    """Returns the stages of a training that have units to train; the others are skipped, and logged.

    Args:
        stages: "clue", or the stages.
        objective: for schedules that are given by name.
        selection: what trains.

    Raises:
        UnknownNameError, SettingError: see ``make_stages``.
        SelectionError: no stage has a unit to train.
    """
    every = make_stages(stages, objective)
    present = {CATEGORIES[c] for values in selection.categories.values() for c in set(values.tolist())}
    kept = tuple(stage for stage in every if present & set(stage.units))
    if not kept:
        wanted = " or ".join(dict.fromkeys(str(stage) for stage in every))
        raise SelectionError(
            f"no stage has anything to train: the selection has no {wanted}; localize with a criterion that tells them "
            "apart, or give the circuits other edges"
        )
    for stage in every:
        if stage not in kept:
            logger.warning("the stage of %s is skipped: the selection has none", stage)
    return kept


def check_ranked(stages: Sequence[Stage]) -> None:
    """Raises SelectionError if a stage trains forget units alone: units ranked by one score are all conflict units."""
    for stage in stages:
        if CATEGORIES[CONFLICT] not in stage.units:
            raise SelectionError(
                f"a stage trains {stage}, and units that are ranked by one score are all conflict units; localize with "
                "categories, or with the criterion 'circuit'"
            )


def stage_at(stages: Sequence[Stage], epoch: int) -> int:
    """Returns the number of the stage that an epoch belongs to, from 0; the last one goes on for ever."""
    ends = accumulate(stage.epochs for stage in stages)
    return next((number for number, end in enumerate(ends) if epoch < end), len(stages) - 1)
