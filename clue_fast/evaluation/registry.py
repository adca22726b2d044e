"""The registry of metrics: what a metric is, what it needs to see, and which are measured.

A metric is a function of ``Metrics``, what a model answered to the records of a set and how likely it found their
answers; ``metric`` registers it, and the table, the results and the documentation have it. One of one's own::

    from clue_fast.evaluation import metric

    @metric("exact answers", better="higher", better_forgotten="lower")
    def exact(metrics):
        '''Share of the records whose greedy answer is the right one, letter by letter.'''
        pairs = zip(metrics.answers, metrics.records, strict=True)
        return sum(answer == record.completion for answer, record in pairs) / metrics.count

With ``default=False`` it is measured only where ``evaluate(metrics=...)`` names it. ``needs`` says what has to be
measured for it; where that is missing, the metric is skipped, and the results say why.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from clue_fast.errors import UnknownNameError

if TYPE_CHECKING:
    from clue_fast.evaluation.metrics import Metrics

ALL = "all"

BETTER = ("higher", "lower", "near .5", "near 0")
SETS = ("all", "forgotten", "kept", "text")


@dataclass(frozen=True)
class Skipped:
    """Why a metric has no value."""

    reason: str


Measure: TypeAlias = "Callable[[Metrics], float | Sequence[float] | Skipped | None]"
"""Returns the value of a set, or the values of its records, whose mean is that of the set; or why there is none; or
None where it does not apply."""


def _tokens(metrics: Metrics) -> str | None:
    return None if metrics.scores else "figures that were saved have no probabilities of single tokens; evaluate again"


def _vocabulary(metrics: Metrics) -> str | None:
    missing = "the probabilities of other tokens were not measured; name the metric when evaluating"
    return None if metrics.scores and metrics.scores[0].normalized else missing


def _prefixes(metrics: Metrics) -> str | None:
    return None if metrics.prefixes else "no prefixes were continued; name the metric when evaluating"


def _wrong_answers(metrics: Metrics) -> str | None:
    if metrics.truth_ratios:
        return None
    without = sum(not record.perturbed for record in metrics.records)
    who = f"{without} of {metrics.count} records have no" if without < metrics.count else "no record has"
    return f"{who} wrong answers (column perturbed_answer)"


def _unseen(metrics: Metrics) -> str | None:
    beside = metrics.beside
    found = None if beside is None else beside.sets.get(UNSEEN)
    missing = f'no set "{UNSEEN}" of records that no model was trained on'
    return None if found is not None and found.count else missing


def _retrained(metrics: Metrics) -> str | None:
    beside = metrics.beside
    known = beside is not None and beside.name in beside.retrained
    return None if known else "no retrained model to compare with"


UNSEEN = "unseen"
"""The set of records that no model was trained on."""

NEEDS: dict[str, Callable[[Metrics], str | None]] = {
    "tokens": _tokens,
    "vocabulary": _vocabulary,
    "prefixes": _prefixes,
    "wrong answers": _wrong_answers,
    "unseen": _unseen,
    "retrained": _retrained,
}
"""What a metric can need: the probability of every token of an answer ("tokens"), those of all tokens that could stand
in their place ("vocabulary"), what follows on parts of an answer ("prefixes"), the losses of wrong answers, records
that no model was trained on, and the figures of a retrained model. Each says why it is missing, or None."""


@dataclass(frozen=True)
class Metric:
    """A metric, and how it is read.

    Attributes:
        name: as results have it.
        title: in a table; ``{samples}``, ``{relearned}`` and ``{averaged}`` are filled in.
        function: from what was measured of the records of a set to a value, see ``Measure``.
        better: which of ``BETTER`` is better on a set that is to be kept.
        better_forgotten: the same on a set that is to be forgotten.
        sets: of which sets it is: "all", "forgotten" or "kept", or "text", which is not asked anything.
        needs: keys of ``NEEDS``.
        default: whether it is measured without being named.
    """

    name: str
    title: str
    function: Measure
    better: str
    better_forgotten: str
    sets: str
    needs: tuple[str, ...] = ()
    default: bool = True

    def of(self, metrics: Metrics) -> float | Sequence[float] | Skipped | None:
        """What its function returns of a set; None if it is not for that set, and why if something is missing."""
        if metrics.text is not (self.sets == "text"):
            return None
        if self.sets in ("forgotten", "kept") and metrics.forgotten is not (self.sets == "forgotten"):
            return None
        for need in self.needs:
            if (reason := NEEDS[need](metrics)) is not None:
                return Skipped(reason)
        return self.function(metrics)

    @property
    def description(self) -> str:
        """The first paragraph of the docstring."""
        return " ".join(inspect.getdoc(self.function).split("\n\n")[0].split())  # type: ignore[union-attr]


METRICS: dict[str, Metric] = {}
"""All registered metrics by name, in the order of the table."""


def metric(
    title: str,
    *,
    better: str,
    better_forgotten: str,
    sets: str = "all",
    name: str | None = None,
    needs: Iterable[str] = (),
    default: bool = True,
) -> Callable[[Measure], Measure]:
    """Registers a function as a metric; its docstring says what it is.

    Args:
        title, better, better_forgotten, sets, needs, default: see ``Metric``.
        name: in the results; default that of the function.

    Raises:
        UnknownNameError: there is no such direction, no such sets, or no such need.
        ValueError: the docstring is missing.
    """
    needs = tuple(needs)
    for what, value, choices in (
        ("direction", better, BETTER),
        ("direction", better_forgotten, BETTER),
        ("kind of set", sets, SETS),
        *(("need", need, tuple(NEEDS)) for need in needs),
    ):
        if value not in choices:
            raise UnknownNameError(what, value, choices)

    def register(function: Measure) -> Measure:
        if not inspect.getdoc(function):
            raise ValueError(f"metric {function.__name__}: its docstring should say what it is")
        own = name or function.__name__
        METRICS[own] = Metric(own, title, function, better, better_forgotten, sets, needs, default)
        return function

    return register


def metric_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """The metrics that are measured, in the order of the table: those that always are, and those that are named.

    Args:
        names: of metrics, or "all".

    Raises:
        UnknownNameError: there is no such metric.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    for name in sorted(wanted):
        if name != ALL and name not in METRICS:
            raise UnknownNameError("metric", name, (ALL, *METRICS))
    return tuple(name for name, one in METRICS.items() if one.default or ALL in wanted or name in wanted)


def needed(names: Iterable[str]) -> frozenset[str]:
    """What has to be measured for these metrics: keys of ``NEEDS``."""
    return frozenset(need for name in names for need in METRICS[name].needs)
