"""The registry of criteria: formulas from what was measured of a unit to one score.

The higher the score, the sooner the unit is selected. A criterion is a function of ``Measured`` with its formula and
source in the docstring; ``criterion`` registers it, and ``formulas`` holds those of the field. One of one's own, which
``localize``, the command and the tables then know as well::

    from clue_fast.criteria import criterion

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clue_fast.criteria.measurements import MEASUREMENTS, Measurement
from clue_fast.errors import PatchError, SelectionError, SettingError, UnknownNameError
from clue_fast.ops import FIELDS, GRADIENT_FIELDS, fields_of
from clue_fast.selection import Scores, Selection, categorize, check_budget, pools, select
from clue_fast.sites import DEFAULT_KINDS, Site
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

if TYPE_CHECKING:
    from clue_fast.criteria.measure import Task


class Units:
    """What the units of all sites did on one group of tokens. Every attribute is [units] float64.

    a is the activation of a unit, f the target that was differentiated; means are over the counted tokens of the
    group, or over its records where it says so.

    Args:
        statistics: what was recorded.
        group: such as "forget".

    Raises:
        PatchError: from an attribute that was not recorded.
    """

    def __init__(self, statistics: Statistics, group: str) -> None:
        self.statistics, self.group = statistics, group
        self._row = statistics.groups.index(group)

    @property
    def tokens(self) -> Tensor:
        """Number of counted tokens; the same for all units of a site."""
        widths = self.statistics.offsets.diff().to(self.statistics.count.device)
        return self.statistics.count[self._row].double().repeat_interleave(widths)

    @property
    def mean(self) -> Tensor:
        """E[a]."""
        return self._mean("sum")

    @property
    def variance(self) -> Tensor:
        """Var[a], of the population."""
        return (self._mean("square_sum") - self.mean.square()).clamp_min(0.0)

    @property
    def abs_mean(self) -> Tensor:
        """E|a|."""
        return self._mean("magnitude_sum")

    @property
    def max_abs(self) -> Tensor:
        """Greatest |a|."""
        return self._sum("magnitude_max")

    @property
    def active_fraction(self) -> Tensor:
        """Share of the tokens with a > 0."""
        return self._mean("active_count")

    @property
    def attribution(self) -> Tensor:
        """E[a·∂f/∂a]."""
        return self._gradient_mean("product_sum")

    @property
    def abs_attribution(self) -> Tensor:
        """E|a·∂f/∂a|."""
        return self._gradient_mean("product_magnitude_sum")

    @property
    def square_attribution(self) -> Tensor:
        """E[(a·∂f/∂a)²]."""
        return self._gradient_mean("product_square_sum")

    def record_mean(self, name: str) -> Tensor:
        """Mean over the records of a sum such as ``gradient_square``, see ``clue_fast.criteria.weight_gradients``."""
        sums = self.statistics.record_sums.get(name)
        if sums is None:
            names = ", ".join(self.statistics.record_sums) or "none"
            raise PatchError(f"{name!r} was not recorded; recorded over records: {names}")
        return sums[self._row] / self.statistics.records[self._row].clamp_min(1)

    def _mean(self, field: str) -> Tensor:
        return self._sum(field) / self.tokens

    def _sum(self, field: str) -> Tensor:
        self.statistics.require(self.group, (field,))
        return self.statistics.values[self._row, FIELDS.index(field)]

    def _gradient_mean(self, field: str) -> Tensor:
        if self.statistics.gradient_values is None:
            raise PatchError("no gradients were recorded; record with gradients=True and run backward")
        self.statistics.require(self.group, (field,))
        return self.statistics.gradient_values[self._row, GRADIENT_FIELDS.index(field)] / self.tokens


@dataclass(frozen=True)
class Measured:
    """What a criterion is a function of.

    Attributes:
        statistics: of all units, on forget and retain data.
        seed: of what is random.
        backend: of operators, or None for the best.
        found: what the criterion found in the records itself, see ``Criterion.find``.
    """

    statistics: Statistics
    seed: int = 0
    backend: str | None = None
    found: Any = None

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
        function: from what was measured to one score per unit, [units].
        needs: what has to be measured, a key of ``MEASUREMENTS``.
        target: what is differentiated unless another is asked for, a key of ``TARGETS``, or None.
        importance: from what was measured on one set to how much each unit matters to it, [units], or None where
            the criterion only compares; the four categories come from two of them.
        kinds: of units that are ranked unless others are asked for, see ``find_sites``.
        settings: class of the settings that ``localize`` takes for it, or None.
        many_retain_sets: whether it tells several retain sets apart.
        always_categorizes: whether it gives categories without being asked to.
        reads: the statistics that it and its importance are made of, of ``clue_fast.ops.STATISTICS``, which then
            are measured alone; None for all.
    """

    name: str
    function: Formula
    needs: str
    target: str | None = None
    importance: Importance | None = None
    kinds: tuple[str, ...] = DEFAULT_KINDS
    settings: type | None = None
    many_retain_sets: bool = False
    always_categorizes: bool = False
    reads: tuple[str, ...] | None = None

    @property
    def formula(self) -> str:
        """The first paragraph of the docstring."""
        return " ".join(inspect.getdoc(self.function).split("\n\n")[0].split())  # type: ignore[union-attr]

    @property
    def source(self) -> str:
        """What the docstring gives as source."""
        return " ".join(inspect.getdoc(self.function).partition("Source:")[2].split())  # type: ignore[union-attr]

    @property
    def measurement(self) -> Measurement:
        """What has to be measured."""
        return MEASUREMENTS[self.needs]

    @property
    def subject(self) -> str:
        """What it is about, for messages."""
        return f"{self.name} units"

    # What localize asks of a criterion, in this order.

    def check(self, budget: Mapping[str, Any], retain: Any, settings: Any, categories: bool) -> None:
        """Refuses what it has no use for, before anything is loaded.

        Args:
            budget: fraction, count, threshold, scope and normalize, as they were given.
            retain, settings, categories: as they were given.

        Raises:
            SelectionError: there are several retain sets, or categories are wanted of what only compares.
            SettingError: the settings are of another criterion.
        """
        if isinstance(retain, Mapping) and not self.many_retain_sets:
            those = " or ".join(repr(each.name) for each in CRITERIA.values() if each.many_retain_sets)
            raise SelectionError(f"several retain sets need the criterion {those}; {self.name!r} compares two sets")
        if settings is not None and not isinstance(settings, self.settings or ()):
            owner = next((each for each in CRITERIA.values() if isinstance(settings, each.settings or ())), None)
            need = f"settings of {owner.subject} need the criterion {owner.name!r}" if owner else f"{settings!r}"
            raise SettingError(f"{need}; {self.name!r} has no use for them")
        if categories:
            get_importance(self.name)

    def check_sites(self, model: nn.Module, sites: Sequence[Site], budget: Mapping[str, Any]) -> None:
        """Refuses sites and a budget that do not go together, before the model runs over any data.

        Raises:
            BudgetError: there are fewer units than are to be selected.
        """
        if budget["count"] is not None or isinstance(budget["fraction"], Mapping):
            limits = {name: budget[name] for name in ("fraction", "count", "threshold", "scope")}
            pools(tuple(sites), *check_budget(**limits), budget["scope"])

    def find(self, task: Task) -> Any:
        """Looks for something in the records itself, beside what is measured of units; None if it does not."""
        return None

    def select(self, measured: Measured, budget: Mapping[str, Any], categories: bool = False) -> Selection:
        """The selection: the top units by score, or those of each category by importance."""
        if categories:
            return categorize(*importances(measured.statistics, self.name), **budget)
        return select(scores_of(self, measured), **budget)


CRITERIA: dict[str, Criterion] = {}
"""All registered criteria by name."""


def criterion(
    *,
    needs: str,
    target: str | None = None,
    importance: Importance | None = None,
    kind: type[Criterion] = Criterion,
    reads: tuple[str, ...] | None = None,
) -> Callable[[Formula], Formula]:
    """Registers a function as the criterion of its name; see the module for an example.

    Args:
        needs: what has to be measured, a key of ``MEASUREMENTS``.
        target: what is differentiated, if anything is, a key of ``TARGETS``.
        importance: see ``Criterion``.
        kind: class of the criterion, which may select in another way than by ranking scores.
        reads: see ``Criterion``.

    Raises:
        UnknownNameError: needs is no key of ``MEASUREMENTS``, or reads names no statistics.
        ValueError: the docstring lacks a formula or a line "Source:".
    """
    if needs not in MEASUREMENTS:
        raise UnknownNameError("measurement", needs, MEASUREMENTS)
    fields_of(reads or ())

    def register(function: Formula) -> Formula:
        if "Source:" not in (inspect.getdoc(function) or ""):
            raise ValueError(f"criterion {function.__name__}: its docstring needs the formula and a line 'Source: ...'")
        CRITERIA[function.__name__] = kind(function.__name__, function, needs, target, importance, reads=reads)
        return function

    return register


def get_criterion(name: str) -> Criterion:
    """Returns a criterion by its name. Raises UnknownNameError, which names the choices there are."""
    if name not in CRITERIA:
        raise UnknownNameError("criterion", name, CRITERIA)
    return CRITERIA[name]


def check_criterion(name: str) -> str:
    """Returns the name of a criterion. Raises UnknownNameError."""
    return get_criterion(name).name


def get_importance(name: str) -> Importance:
    """Returns the importance that a criterion gives to a unit. Raises SelectionError if it only compares both sets."""
    importance = get_criterion(name).importance
    if importance is None:
        having = ", ".join(sorted(other for other, each in CRITERIA.items() if each.importance is not None))
        raise SelectionError(
            f"criterion {name!r} compares both sets and gives no importance to either, so it has no categories; "
            f"choose one of: {having}"
        )
    return importance


def score(
    statistics: Statistics, criterion: str = "difference", *, seed: int = 0, backend: str | None = None
) -> Scores:
    """Scores every unit of every site.

    Args:
        statistics: with the groups ``forget`` and ``retain`` (not needed by ``random``).
        criterion: a key of ``CRITERIA``; the default is one that needs activations alone.
        seed: of ``random``.
        backend: forces a backend.

    Returns:
        ``{site: [width] float32}``, on the device of the statistics.

    Raises:
        UnknownNameError: no such criterion.
        SelectionError: the criterion scores more than statistics hold.
        PatchError: a group was not recorded, or without what the criterion needs.
        NonFiniteError: the statistics hold NaN or infinity.
    """
    return scores_of(get_criterion(criterion), Measured(statistics, seed, backend))


def scores_of(criterion: Criterion, measured: Measured) -> Scores:
    """Scores from all that was measured; see ``score``."""
    if criterion.measurement.passes != (0, 0):
        _require(measured.statistics, criterion)
    return _scores(measured.statistics, criterion.function(measured), criterion.name)


def importances(statistics: Statistics, criterion: str = "attribution") -> tuple[Scores, Scores]:
    """How much every unit matters to the forget and to the retain data, from which ``categorize`` makes categories.

    Raises:
        SelectionError: the criterion only compares the two sets.
        UnknownNameError, PatchError, NonFiniteError: see ``score``.
    """
    chosen, importance = get_criterion(criterion), get_importance(criterion)
    _require(statistics, chosen)
    forget, retain = (_scores(statistics, importance(Units(statistics, g)), criterion) for g in DEFAULT_GROUPS)
    return forget, retain


def _scores(statistics: Statistics, values: Tensor, criterion: str) -> Scores:
    units = int(statistics.offsets[-1])
    if values.shape != (units,):
        raise SelectionError(f"criterion {criterion!r} gave scores of shape {list(values.shape)} for {units} units")
    split = torch.split(values.float(), [site.width for site in statistics.sites])
    return Scores(dict(zip(statistics.sites, split, strict=True)), criterion, statistics.fingerprint)


def _require(statistics: Statistics, criterion: Criterion) -> None:
    """Raises PatchError unless something was counted of both groups, with gradients where the criterion needs them."""
    needed = criterion.measurement
    for row, name in enumerate(DEFAULT_GROUPS):
        counted = statistics.count[row].min() if needed.counts == "token" else statistics.records[row]
        if statistics.groups[row] != name or int(counted) == 0:
            raise PatchError(
                f"criterion {criterion.name!r} compares forget and retain, and no {name} {needed.counts} was recorded "
                f"for it; record group {name!r} first, or batches that bring both groups"
            )
    if needed.gradients and statistics.gradient_values is None:
        raise PatchError(f"criterion {criterion.name!r} needs gradients; record with gradients=True and run backward")
    statistics.check_finite()
