"""The tables of a report: every metric, every answer, settings and hashes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from clue_fast.evaluation import ANSWERED, METRICS, forget_quality, metric_title
from clue_fast.html_report.columns import Column, decimal, missing, spoken
from clue_fast.html_report.svg import Markup, element, joined

ROWS = 200
"""Most records of a set whose answers are shown; ``results.json`` has all."""

Runs = Mapping[str, Mapping[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[object]], *, heads: int, numbers: bool = True) -> Markup:
    """A table in a box that scrolls where it is too wide.

    Args:
        head: titles of the columns.
        rows: cells, as many as there are titles.
        heads: how many cells of a row are its headers.
        numbers: columns that hold nothing but numbers stand at the right.
    """
    right = [numbers and index >= heads and _numeric([row[index] for row in rows]) for index in range(len(head))]
    kinds = ["number" if own else None for own in right]
    titles = [element("th", title, scope="col", class_=kind) for title, kind in zip(head, kinds, strict=True)]
    body = [
        element(
            "tr",
            *(element("th", cell, scope="row") for cell in row[:heads]),
            *(element("td", cell, class_=kind) for cell, kind in zip(row[heads:], kinds[heads:], strict=True)),
        )
        for row in rows
    ]
    whole = element("table", element("thead", element("tr", *titles)), element("tbody", *body))
    return element("div", whole, class_="wide", tabindex=0, role="region", aria_label=f"table: {', '.join(head)}")


def _numeric(cells: Sequence[object]) -> bool:
    return bool(cells) and all(str(cell)[:1].isdigit() or str(cell)[:1] == "-" for cell in cells)


def left_out(rows: Sequence[object]) -> Markup | None:
    """Says so where there are more rows than are shown."""
    return element("p", f"The first {ROWS} of {len(rows)} are shown.", class_="note") if len(rows) > ROWS else None


def measured(columns: Sequence[Column]) -> Markup:
    """Every metric of every set, a column a model."""
    rows: list[list[str]] = []
    for name, figures in columns[0].figures.items():
        for metric in METRICS:
            values = [column.figures.get(name, {}).get(metric) for column in columns]
            if any(value is not None for value in values):
                rows.append([spoken(name), metric_title(metric, figures), *(decimal(value) for value in values)])
        quality = [_quality(column, columns, name) for column in columns]
        if any(quality):
            rows.append([spoken(name), "forget quality (KS p)", *(value or "-" for value in quality)])
    note = (
        "A question counts as answered if its greedy answer has a ROUGE-L recall of at least .5; next-token accuracy "
        "is teacher-forced; a retrained model was trained without the forget set."
    )
    head = ["set", "metric", *(column.name for column in columns)]
    skipped = {
        f"{spoken(name)}: {spoken(metric)} was skipped: {reason}"
        for column in columns
        for name, figures in column.figures.items()
        for metric, reason in figures.get("skipped", {}).items()
    }
    return joined([table(head, rows, heads=2), element("p", note, class_="note"), *map(missing, sorted(skipped))])


def _quality(column: Column, columns: Sequence[Column], name: str) -> str | None:
    """P of the test against the retrained model, of a set that is to be forgotten."""
    retrained = next((one for one in columns if one.stage == "retrained"), None)
    if retrained is None or not retrained.figures.get(name, {}).get("forgotten"):
        return None
    own, other = (one.figures.get(name, {}).get("truth_ratios", []) for one in (column, retrained))
    return f"{forget_quality(own, other)[0]:.1e}" if own and other else None


def answers(columns: Sequence[Column], results: Sequence[Mapping[str, Any]]) -> Markup:
    """Every question with its right answer and what each model said, a part a set."""
    parts = []
    for name, figures in columns[0].figures.items():
        if figures.get("text"):
            continue
        records = _records(name, results[0])
        shown = [c for c in columns if records and _has_answers(c, name, len(records), results)]
        if not shown or records is None:
            parts.append(missing(f"{spoken(name)}: the results do not hold questions and answers by record."))
            continue
        counts = (sum(recall >= ANSWERED for recall in own.figures[name]["rouge_recalls"]) for own in shown)
        told = ", ".join(f"{own.name} {count}" for own, count in zip(shown, counts, strict=True))
        summary = element("summary", f"{spoken(name)}: of {len(records)} questions answered {told}")
        content = (summary, _answer_table(name, records, shown), left_out(records))
        parts.append(element("details", *content, open=name == "forget" or None))
        parts += [
            missing(f"{column.name} is left out here: its {spoken(name)} records are others.")
            for column in columns
            if name in column.figures and not _same(results, column, name)
        ]
    return joined(parts)


def _records(name: str, results: Mapping[str, Any]) -> Sequence[Mapping[str, str]] | None:
    """Questions and answers of a set, or of the half of the forget records that scaling did not look at."""
    records: Mapping[str, Sequence[Mapping[str, str]]] = results.get("records", {})
    numbers = results.get("scaling", {}).get("reported")
    if name == "forget_reported" and numbers and "forget" in records:
        return [records["forget"][number - 1] for number in numbers]
    return records.get(name)


def _same(results: Sequence[Mapping[str, Any]], column: Column, name: str) -> bool:
    """Whether a column's run has the same records as the first."""
    return _records(name, results[0]) == _records(name, results[column.run])


def _has_answers(column: Column, name: str, records: int, results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a model was asked these records, and its answers are known."""
    return _same(results, column, name) and len(column.figures.get(name, {}).get("answers", [])) == records


def _answer_table(name: str, records: Sequence[Mapping[str, str]], columns: Sequence[Column]) -> Markup:
    """With roles said again, since on narrow screens its rows become blocks."""
    head = ["no.", "question", "right answer", *(column.name for column in columns)]
    rows = []
    for index, record in enumerate(records[:ROWS]):
        cells = [
            element("th", index + 1, scope="row", role="rowheader"),
            element("td", record["question"], role="cell", data_label="question"),
            element("td", record["answer"], role="cell", data_label="right answer"),
        ]
        for column in columns:
            answer, recall = (column.figures[name][key][index] for key in ("answers", "rouge_recalls"))
            mark, kind = ("✓ answered", "yes") if recall >= ANSWERED else ("✗ not answered", "no")
            told = element("span", f"{mark}, recall {recall:.2f}", class_="told")
            cells.append(element("td", answer, told, role="cell", class_=kind, data_label=column.name))
        rows.append(element("tr", *cells, role="row"))
    titles = (element("th", title, scope="col", role="columnheader") for title in head)
    return element(
        "table",
        element("caption", f"{spoken(name)} records: what was asked, what is right, and what each model said"),
        element("colgroup", element("col", class_="n"), *(element("col") for _ in head[1:])),
        element("thead", element("tr", *titles, role="row"), role="rowgroup"),
        element("tbody", *rows, role="rowgroup"),
        role="table",
        class_="answers",
    )


def settings(runs: Runs) -> Markup:
    """Settings of each run; of several, those that differ are marked."""
    known = {name: results.get("settings") or {} for name, results in runs.items()}
    rows: list[list[object]] = []
    for key in dict.fromkeys(key for own in known.values() for key in own):
        values = [_value(own.get(key)) for own in known.values()]
        differs = " (differs)" if len(set(values)) > 1 else ""
        rows.append([f"{spoken(key)}{differs}", *(element("code", value) for value in values)])
    for stage in dict.fromkeys(stage for results in runs.values() for stage in results.get("seconds", {})):
        taken = [decimal(results.get("seconds", {}).get(stage), 1) for results in runs.values()]
        rows.append([f"seconds: {stage}", *taken])
    if not rows:
        return missing("The results hold no settings.")
    return table(["setting", *(runs if len(runs) > 1 else ["value"])], rows, heads=1, numbers=False)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def hashes(runs: Runs) -> Markup:
    """What names the data, the weights and the selection without telling what is in them."""
    found: dict[str, dict[str, str]] = {}
    for name, results in runs.items():
        for own, data in results.get("data", {}).items():
            found.setdefault(f"data: {spoken(own)}, {data['records']} records", {})[name] = data["hash"]
        for stage, value in results.get("weights", {}).get("hash", {}).items():
            found.setdefault(f"weights: {stage}", {})[name] = value
        if "selection" in results:
            found.setdefault("selection", {})[name] = results["selection"]["hash"]
    rows = [[key, *(element("code", values.get(name, "-")) for name in runs)] for key, values in found.items()]
    parts = [table(["of", *(runs if len(runs) > 1 else ["hash"])], rows, heads=1, numbers=False)] if rows else []
    if not any(key.startswith("weights") for key in found):
        parts.append(
            missing("No hash of the weights: only a model was measured, or an earlier version wrote the results.")
        )
    return joined(parts)
