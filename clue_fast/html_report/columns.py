"""The models that a report puts side by side, and what several of its parts ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clue_fast.html_report.svg import MARKERS, Markup, Series, element

STAGES = {
    "before": "before",
    "model": "model",
    "trained": "after training",
    "after": "after",
    "retrained": "retrained",
}
"""The models that a run may have measured, in the order of the columns, and what the report calls them."""

COLORS = {"before": "c0", "model": "c1", "trained": "c5", "after": "c1", "retrained": "c2"}
SHAPES = {"before": "circle", "model": "square", "trained": "diamond", "after": "square", "retrained": "triangle"}
DASHES = {"before": "2 4", "retrained": "8 4"}

Figures = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Column:
    """A model in the report.

    Attributes:
        name: at the head of its column.
        stage: a key of STAGES.
        figures: of each set, as ``results.json`` has them.
        run: the number of its run, from 0.
        color, shape, dashes: of its line in a chart.
    """

    name: str
    stage: str
    figures: Mapping[str, Figures]
    run: int
    color: str
    shape: str
    dashes: str | None

    def series(self, points: Sequence[tuple[float, float]], line: str = "straight", marker: bool = True) -> Series:
        """Its line in a chart."""
        return Series(self.name, points, self.color, self.shape if marker else "", line, self.dashes)


def columns_of(runs: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """Every model of one run; of several, the first's before, each one's after, and the first's retrained."""
    several = len(runs) > 1
    found: list[Column] = []
    for number, (name, results) in enumerate(runs.items()):
        for stage, figures in results["evaluation"].items():
            if stage not in STAGES or (several and number and stage in ("before", "retrained")):
                continue
            own = several and stage not in ("before", "retrained")
            title = "after scaling" if stage == "after" and "trained" in results["evaluation"] else STAGES[stage]
            found.append(
                Column(
                    (name if stage in ("model", "after") else f"{name}, {title}") if own else title,
                    stage,
                    figures,
                    number,
                    f"c{(1, 3, 4, 5, 6, 7)[number % 6]}" if own else COLORS[stage],
                    MARKERS[(1 + number) % len(MARKERS)] if own else SHAPES[stage],
                    DASHES.get(stage),
                )
            )
    return sorted(found, key=lambda column: (column.stage == "retrained", column.run, list(STAGES).index(column.stage)))


def attempts_of(column: Column) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Title and attempt of everything that a model was attacked with, but for asking as it is."""
    for name, attacked in column.figures.get("forget", {}).get("attacks", {}).items():
        for attempt in attacked["attempts"]:
            if name != "greedy" and attempt["step"] != 0:
                yield attacked["title"], attempt


def forget_set(columns: Sequence[Column]) -> str:
    """The set that says what was forgotten: where a target decided, the half that it did not look at."""
    return "forget_reported" if all("forget_reported" in c.figures for c in columns) else "forget"


def others_of(columns: Sequence[Column]) -> list[str]:
    """The sets of questions that were not to be forgotten."""
    asked = (name for name, figures in columns[0].figures.items() if figures.get("rouge_recall") is not None)
    return [name for name in asked if not name.startswith("forget")]


def missing(text: str) -> Markup:
    """Names what is not there, and why."""
    return element("p", text, class_="missing")


def spoken(name: str) -> str:
    """The name of a set or setting as it is read."""
    return name.replace("_", " ")


def decimal(value: Any, digits: int = 3) -> str:
    """A number with so many digits, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"
