"""The objectives that there are, by name: those of this package, and any that is registered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from clue_fast.config import OBJECTIVE, OBJECTIVE_SETTINGS
from clue_fast.errors import SettingError, UnknownNameError
from clue_fast.objectives.base import Objective

Registered = TypeVar("Registered", bound=Objective)

OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(objective: type[Registered]) -> type[Registered]:
    """Makes an objective known by its name: to ``UnlearnTrainer``, ``unlearn`` and the command.

    A decorator of a frozen dataclass, whose docstring says what it computes and where it was published::

        @register_objective
        @dataclass(frozen=True)
        class Margin(Objective):
            name: ClassVar[str] = "margin"
            least: float = 5.0

            def forget_term(self, current, original):
                forget = current["forget"]
                return forget.mean((self.least - forget.losses).clamp(min=0.0))

    Raises:
        SettingError: another objective has that name.
    """
    known = OBJECTIVES.get(objective.name)
    # The same class may be defined again, as in a notebook.
    if known is not None and (known.__module__, known.__qualname__) != (objective.__module__, objective.__qualname__):
        raise SettingError(
            f"there is an objective {objective.name!r} already, {known.__qualname__}; choose another name"
        )
    OBJECTIVES[objective.name] = objective
    return objective


def get_objective(objective: str | Objective, **overrides: Any) -> Objective:
    """Returns an objective by its name, or the given one, with some of its parameters replaced.

    Raises:
        UnknownNameError: no objective has that name.
        TypeError: the objective has no such parameter.
    """
    if isinstance(objective, Objective):
        return replace(objective, **overrides)
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective](**overrides)


def default_objective() -> Objective:
    """Returns the objective of every training that does not say another, see ``clue_fast.config``."""
    return get_objective(OBJECTIVE, **OBJECTIVE_SETTINGS)
