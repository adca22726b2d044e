"""All units of a model side by side, and what they did on the data of one group.

Targets: the scalar function of an answer that is differentiated to see what a unit does for it.

Criteria: formulas from what was measured of a unit to one score. The higher, the sooner the unit is selected.

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

from clue_fast.data import answer_mask, shift_labels
from clue_fast.errors import PatchError, SelectionError, UnknownNameError
from clue_fast.ops import FIELDS, GRADIENT_FIELDS
from clue_fast.selection import Scores
from clue_fast.statistics import DEFAULT_GROUPS, Statistics


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
        return self.statistics.values[self._row, FIELDS.index("magnitude_max")]

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
        """Mean over the records of a sum such as ``gradient_square``, see ``clue_fast.localization``."""
        sums = self.statistics.record_sums.get(name)
        if sums is None:
            names = ", ".join(self.statistics.record_sums) or "none"
            raise PatchError(f"{name!r} was not recorded; recorded over records: {names}")
        return sums[self._row] / self.statistics.records[self._row].clamp_min(1)

    def _mean(self, field: str) -> Tensor:
        return self.statistics.values[self._row, FIELDS.index(field)] / self.tokens

    def _gradient_mean(self, field: str) -> Tensor:
        if self.statistics.gradient_values is None:
            raise PatchError("no gradients were recorded; record with gradients=True and run backward")
        return self.statistics.gradient_values[self._row, GRADIENT_FIELDS.index(field)] / self.tokens


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    others = torch.logsumexp(logits.scatter(1, labels, float("-inf")), dim=1)
    return logits.gather(1, labels).squeeze(1) - others


def _logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels).squeeze(1)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels.squeeze(1), reduction="none")


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, labels).squeeze(1)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_odds": _log_odds,
    "logit": _logit,
    "loss": _loss,
    "probability": _probability,
}
"""By name, from logits [tokens, vocabulary] float32 and labels [tokens, 1] to one value a token."""


def check_target(name: str) -> str:
    """Returns the name of a target. Raises UnknownNameError."""
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return name


def answer_target(logits: Tensor, labels: Tensor, target: str, head: str = "causal") -> tuple[Tensor, Tensor]:
    """The target of every answer token, where it is predicted.

    The gradients of ``loss`` and ``probability`` vanish where an answer is memorized; those of ``log_odds``,
    log p - log(1 - p), and ``logit`` do not.

    Args:
        logits: [records, tokens, vocabulary].
        labels: [records, tokens] int64, -100 where the token is no answer.
        target: a key of ``TARGETS``.
        head: of the model, see ``clue_fast.data.labels``.

    Returns:
        The values, [answer tokens] float32, and the record of each, int64.
    """
    chosen = TARGETS[check_target(target)]
    answer = answer_mask(labels, head)
    rows = torch.nonzero(answer)[:, 0]
    # float64 stays, as a reference may want it
    selected = logits[answer]
    wide = selected if selected.dtype == torch.float64 else selected.float()
    return chosen(wide, shift_labels(labels, head)[answer][:, None]), rows


def record_target(logits: Tensor, labels: Tensor, target: str, head: str = "causal") -> Tensor:
    """The mean of the target over the answer tokens of each record, [records] float32; arguments as above."""
    values, rows = answer_target(logits, labels, target, head)
    counts = torch.bincount(rows, minlength=labels.shape[0]).clamp_min(1)
    return torch.zeros(labels.shape[0], dtype=values.dtype, device=values.device).index_add(0, rows, values) / counts


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
