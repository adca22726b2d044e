"""Before and after unlearning, beside a model that never saw the forget set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from clue_fast.errors import DataError
from clue_fast.evaluation.metrics import Metrics
from clue_fast.evaluation.truth import forget_quality

COMPARED = {
    "answered": "questions answered",
    "answered_in_samples": "answered, best of {samples}",
    "answered_before_relearning": "answered, others than {relearned}",
    "answered_after_relearning": "answered, {relearned} relearned",
    "rouge_recall": "ROUGE-L recall",
    "accuracy": "next-token accuracy",
    "probability": "answer probability",
    "loss": "answer loss",
    "truth_ratio": "truth ratio",
}
"""Metrics in the order of the table, with their titles."""


def metric_title(metric: str, figures: Mapping[str, Any]) -> str:
    """How a table calls a metric of a set with these figures, as ``Metrics.summary`` has them."""
    return COMPARED[metric].format_map({"samples": 0, "relearned": 0, **figures})


@dataclass(frozen=True)
class Row:
    """One metric on one set of records; reference is None where there is no reference model."""

    set: str
    metric: str
    title: str
    before: float
    after: float
    reference: float | None

    @property
    def kept(self) -> float | None:
        """After over before; None where before is 0."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class Comparison:
    """Every metric on every set, before and after.

    Attributes:
        rows: one a set and metric.
        forget_quality: {"before": (p, D), "after": (p, D)} against the reference; empty without truth ratios
            of both.
    """

    rows: tuple[Row, ...]
    forget_quality: dict[str, tuple[float, float]]

    def row(self, set: str, metric: str) -> Row:
        """The row of one set and metric, such as ("forget", "answered")."""
        for row in self.rows:
            if (row.set, row.metric) == (set, metric):
                return row
        raise KeyError((set, metric))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "rows": [{**asdict(row), "kept": row.kept} for row in self.rows],
            "forget_quality": {
                when: {"p": p, "statistic": statistic} for when, (p, statistic) in self.forget_quality.items()
            },
        }

    def table(self) -> str:
        """The comparison as an aligned Markdown table."""
        with_reference = any(row.reference is not None for row in self.rows)
        header = ["set", "metric", "before", "after"] + ["never saw it"] * with_reference
        body = [
            [row.set.replace("_", " "), row.title, _number(row.before), _number(row.after)]
            + [_number(row.reference)] * with_reference
            for row in self.rows
        ]
        if self.forget_quality:
            values = [f"{self.forget_quality[when][0]:.1e}" for when in ("before", "after")]
            body.append(["forget", "forget quality (KS p)", *values, "1"])
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        rule = ["-" * width if index < 2 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
        return "\n".join(_line(cells, widths) for cells in (header, rule, *body))


def compare(
    before: Mapping[str, Metrics],
    after: Mapping[str, Metrics],
    reference: Mapping[str, Metrics] | None = None,
) -> Comparison:
    """Puts two evaluations of the same sets side by side.

    Args:
        before: results of `evaluate` before unlearning.
        after: results of `evaluate` after it, on the same sets.
        reference: results of a model that never saw the forget set.

    Raises:
        DataError: the evaluations are of different sets.
    """
    for stage, other in (("after", after), ("reference", reference)):
        if other is None:
            continue
        if {name: m.count for name, m in other.items()} != {name: m.count for name, m in before.items()}:
            raise DataError(
                f"the evaluations 'before' and {stage!r} are not of the same sets; evaluate both on the same"
            )
        for name, metrics in before.items():
            for count in ("samples", "relearned"):
                wanted, found = getattr(metrics, count), getattr(other[name], count)
                if wanted and found not in (0, wanted):
                    raise DataError(
                        f"of the {name} set, {count} is {wanted} 'before' and {found} in {stage!r}; measure both alike"
                    )
    rows = tuple(
        Row(
            name,
            metric,
            metric_title(metric, before[name].summary()),
            getattr(before[name], metric),
            getattr(after[name], metric),
            _of(reference, name, metric),
        )
        for name in before
        for metric in COMPARED
        if getattr(before[name], metric) is not None and getattr(after[name], metric) is not None
    )
    quality = {}
    if reference is not None and "forget" in before:
        known = reference["forget"].truth_ratios
        evaluations = {"before": before["forget"].truth_ratios, "after": after["forget"].truth_ratios}
        if known and all(evaluations.values()):
            quality = {when: forget_quality(ratios, known) for when, ratios in evaluations.items()}
    return Comparison(rows, quality)


def _of(evaluation: Mapping[str, Metrics] | None, name: str, metric: str) -> float | None:
    return None if evaluation is None else getattr(evaluation[name], metric)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"
