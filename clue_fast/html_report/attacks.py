"""What is still answered under attack: the curve of relearning, every attack in a row, and what came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clue_fast.evaluation import ANSWERED
from clue_fast.html_report.columns import Column, attempts_of, decimal, missing
from clue_fast.html_report.svg import Axis, Markup, chart, element, joined, percent
from clue_fast.html_report.tables import ROWS, left_out, table


def attacks(columns: Sequence[Column], results: Mapping[str, Any]) -> Markup:
    """What attacks bring out of each model; the results are those of the first run."""
    attacked = {column: own for column in columns if (own := column.figures.get("forget", {}).get("attacks"))}
    if not attacked:
        return missing("No attack was tried; ask for them with --attacks all.")
    told = (
        "Share of the forget questions whose answer comes (ROUGE-L recall of at least .5) when somebody tries harder. "
        "What a retrained model says under the same attack is guessed."
    )
    parts = [element("p", told), _curves(attacked), _overview(attacked)]
    skipped = {name: one["skipped"] for own in attacked.values() for name, one in own.items() if one["skipped"]}
    parts += [missing(f"{name} was skipped: {reason}.") for name, reason in skipped.items()]
    records = results.get("records", {}).get("forget")
    if records:
        parts += [_revealed(column, records) for column in attacked if column.stage in ("after", "model")]
    return joined(parts)


def _curves(attacked: Mapping[Column, Mapping[str, Any]]) -> Markup:
    """What is answered after every few steps of relearning."""
    every = {column: own.get("relearning", {}).get("attempts", []) for column, own in attacked.items()}
    curves = {column: [(one["step"], one["answered"]) for one in own] for column, own in every.items() if own}
    if not curves:
        return missing("No curve of relearning: that attack was not tried, or could not be.")
    last = max(step for points in curves.values() for step, _ in points)
    ends = ((column.name, points[0][1], points[-1][1]) for column, points in curves.items())
    told = "; ".join(f"{name}: {first:.1%} at first, {final:.1%} at last" for name, first, final in ends)
    return chart(
        f"Relearning: other forget questions answered after every few steps. {told}.",
        Axis("steps of relearning", 0, max(last, 1)),
        Axis("other questions answered", 0, 1, percent),
        [column.series(points) for column, points in curves.items()],
        "A copy of each model learns a part of the forget records again; the others are asked.",
    )


def _overview(attacked: Mapping[Column, Mapping[str, Any]]) -> Markup:
    """Every variant in a row, a column a model."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for index, (column, own) in enumerate(attacked.items()):
        plain = [("as it is", attempt) for attempt in own.get("greedy", {}).get("attempts", [])]
        for title, attempt in [*plain, *attempts_of(column)]:
            key = (title, attempt["variant"], str(len(attempt["recalls"])))
            count = sum(recall >= ANSWERED for recall in attempt["recalls"])
            rows.setdefault(key, ["-"] * len(attacked))[index] = f"{count} ({attempt['answered']:.1%})"
    head = ["attack", "variant", "asked", *(column.name for column in attacked)]
    return table(head, [[*key, *values] for key, values in rows.items()], heads=2)


def _revealed(column: Column, records: Sequence[Mapping[str, str]]) -> Markup:
    """What each attack brought out of a model, record by record."""
    rows = [
        [str(index + 1), *records[index].values(), attempt["variant"], answer, decimal(recall)]
        for _, attempt in attempts_of(column)
        for index, answer, recall in zip(attempt["asked"], attempt["answers"], attempt["recalls"], strict=True)
        if recall >= ANSWERED and index < len(records)
    ]
    title = f"Answers that attacks brought out of the model {column.name!r}: {len(rows)}"
    if not rows:
        return element("p", f"{title}.", class_="note")
    head = ["record", "question", "right answer", "attack", "what was said", "recall"]
    return element("details", element("summary", title), table(head, rows[:ROWS], heads=1), left_out(rows))
