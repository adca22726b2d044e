"""Criteria: formulas from what was measured of a unit to one score. The higher, the sooner the unit is selected.

A criterion is a function of ``Measured`` with its formula and source in the docstring; ``criterion`` registers it,
and ``formulas`` holds those of the field. A criterion of one's own::

    from clue_fast.localization import criterion

    @criterion(needs="activations", importance=lambda units: units.max_abs)
    def peak(measured):
        '''max_forget|a| - max_retain|a|

        Source: mine.
        '''
        return measured.forget.max_abs - measured.retain.max_abs

    clue_fast.localize(model, forget, retain, tokenizer=tokenizer, criterion="peak")
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from clue_fast.errors import PatchError, SelectionError, UnknownNameError
from clue_fast.localization.units import Units
from clue_fast.selection import Scores
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

PASSES = {
    "nothing": (0, 0),
    "activations": (1, 0),
    "weight_inputs": (1, 0),
    "gradients": (1, 1),
    "squared_gradients": (1, 1),
    "mean_gradients": (1, 1),
    "integrated_gradients": (1, 1),
}
"""What a criterion can need, and the forward and backward passes over each data set that it costs; for
``mean_gradients`` that many for every 8 GiB of gradients, 8 bytes a weight, for ``integrated_gradients`` for each step
and layer."""


@dataclass(frozen=True)
class Measured:
    """What a criterion is a function of.

    Attributes:
        statistics: of all units, on forget and retain data.
        seed: of what is random.
        backend: of operators, or None for the best.
    """

    statistics: Statistics
    seed: int = 0
    backend: str | None = None

    @property
    def forget(self) -> Units:
        """All units on the forget data."""
        return Units(self.statistics, "forget")

    @property
    def retain(self) -> Units:
        """All units on the retain data."""
        return Units(self.statistics, "retain")


Formula = Callable[[Measured], Tensor]
Importance = Callable[[Units], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A criterion and what it needs.

    Attributes:
        name: as given to ``score`` and ``localize``.
        function: from what was measured to one score a unit, [units].
        needs: what has to be measured, a key of ``PASSES``.
        target: what is differentiated unless another is asked for, a key of ``targets.TARGETS``, or None.
        importance: from what was measured on one set to how much each unit matters to it, [units], or None where
            the criterion only compares; the four categories come from two of them.
    """

    name: str
    function: Formula
    needs: str
    target: str | None = None
    importance: Importance | None = None

    @property
    def formula(self) -> str:
        """The first paragraph of the docstring."""
        return " ".join(inspect.getdoc(self.function).split("\n\n")[0].split())  # type: ignore[union-attr]

    @property
    def source(self) -> str:
        """What the docstring gives as source."""
        return " ".join(inspect.getdoc(self.function).partition("Source:")[2].split())  # type: ignore[union-attr]


CRITERIA: dict[str, Criterion] = {}
"""All registered criteria by name."""


def criterion(
    *, needs: str, target: str | None = None, importance: Importance | None = None
) -> Callable[[Formula], Formula]:
    """Registers a function as the criterion of its name; see the module for an example.

    Args:
        needs: what has to be measured, a key of ``PASSES``.
        target: what is differentiated, if anything is, a key of ``targets.TARGETS``.
        importance: see ``Criterion``.

    Raises:
        UnknownNameError: needs is no key of ``PASSES``.
        ValueError: the docstring lacks a formula or a line "Source:".
    """
    if needs not in PASSES:
        raise UnknownNameError("measurement", needs, PASSES)

    def register(function: Formula) -> Formula:
        if "Source:" not in (inspect.getdoc(function) or ""):
            raise ValueError(f"criterion {function.__name__}: its docstring needs the formula and a line 'Source: ...'")
        CRITERIA[function.__name__] = Criterion(function.__name__, function, needs, target, importance)
        return function

    return register


def get_criterion(name: str, choices: Iterable[str] = CRITERIA) -> Criterion:
    """Returns a criterion by its name. Raises UnknownNameError, which names the choices there are."""
    if name not in CRITERIA:
        raise UnknownNameError("criterion", name, choices)
    return CRITERIA[name]


def score(
    statistics: Statistics, criterion: str = "difference", *, seed: int = 0, backend: str | None = None
) -> Scores:
    """Scores every unit of every site.

    Args:
        statistics: with the groups ``forget`` and ``retain`` (not needed by ``random``).
        criterion: a key of ``CRITERIA``.
        seed: of ``random``.
        backend: forces a backend.

    Returns:
        ``{site: [width] float32}``, on the device of the statistics.

    Raises:
        UnknownNameError: no such criterion.
        PatchError: a group was not recorded, or without what the criterion needs.
        NonFiniteError: the statistics hold NaN or infinity.
    """
    chosen = get_criterion(criterion)
    if chosen.needs != "nothing":
        _require(statistics, chosen)
    values = chosen.function(Measured(statistics, seed, backend))
    return _scores(statistics, values, criterion)


def importances(statistics: Statistics, criterion: str = "attribution") -> tuple[Scores, Scores]:
    """How much every unit matters to the forget and to the retain data, from which ``categorize`` makes categories.

    Raises:
        SelectionError: the criterion only compares the two sets.
        UnknownNameError, PatchError, NonFiniteError: see ``score``.
    """
    chosen = get_criterion(criterion)
    importance = get_importance(criterion)
    _require(statistics, chosen)
    forget, retain = (_scores(statistics, importance(Units(statistics, g)), criterion) for g in DEFAULT_GROUPS)
    return forget, retain


def get_importance(criterion: str) -> Importance:
    """Returns the importance that a criterion gives to a unit. Raises SelectionError if it only compares both sets."""
    importance = get_criterion(criterion).importance
    if importance is None:
        having = ", ".join(sorted(name for name, other in CRITERIA.items() if other.importance is not None))
        raise SelectionError(
            f"criterion {criterion!r} compares both sets and gives no importance to either, so it has no categories; "
            f"choose one of: {having}"
        )
    return importance


def _scores(statistics: Statistics, values: Tensor, criterion: str) -> Scores:
    units = int(statistics.offsets[-1])
    if values.shape != (units,):
        raise SelectionError(f"criterion {criterion!r} gave scores of shape {list(values.shape)} for {units} units")
    split = torch.split(values.float(), [site.width for site in statistics.sites])
    return Scores(dict(zip(statistics.sites, split, strict=True)), criterion, statistics.fingerprint)


def _require(statistics: Statistics, criterion: Criterion) -> None:
    by_tokens = criterion.needs in ("activations", "gradients")
    for row, name in enumerate(DEFAULT_GROUPS):
        counted = statistics.count[row].min() if by_tokens else statistics.records[row]
        if statistics.groups[row] != name or int(counted) == 0:
            what = "token" if by_tokens else "record"
            raise PatchError(
                f"criterion {criterion.name!r} compares forget and retain, and no {name} {what} was recorded for it"
            )
    if criterion.needs == "gradients" and statistics.gradient_values is None:
        raise PatchError(f"criterion {criterion.name!r} needs gradients; record with gradients=True and run backward")
    statistics.check_finite()
