"""The page: its parts one after another, what a run comes to in a few numbers, and the file it is written to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from clue_fast.data import Record, data_hash
from clue_fast.files import save_text
from clue_fast.html_report.attacks import attacks
from clue_fast.html_report.columns import Column, attempts_of, columns_of, forget_set, others_of, spoken
from clue_fast.html_report.plots import distributions, pareto, training, units_by_layer
from clue_fast.html_report.svg import Markup, element, joined
from clue_fast.html_report.tables import answers, hashes, measured, settings
from clue_fast.selection import CATEGORIES, Selection
from clue_fast.version import __version__

REPORT = "report.html"


def write_report(path: str | os.PathLike[str], runs: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes the report of one run, or of several that are compared, as one file; returns its path.

    Args:
        path: of the file; replaced if it exists.
        runs: the results of each run as ``results.json`` has them, by what the report calls it.

    Raises:
        OutputError: the file cannot be written.
    """
    save_text(path, html_report(runs))
    return Path(path)


def html_report(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the report as HTML, see ``write_report``."""
    columns = columns_of(runs)
    results = list(runs.values())
    titled = runs if len(runs) > 1 else {"": results[0]}
    sections = {
        "Measured": measured(columns),
        "Forget against retain": pareto(columns),
        "Attacks": attacks(columns, results[0]),
        "How sure the model is": distributions(columns),
        "Units selected by layer": _side_by_side(units_by_layer(name, one) for name, one in titled.items()),
        "Training": joined(training(name, one) for name, one in titled.items()),
        "Answers": answers(columns, results),
        "Settings": settings(runs),
        "Hashes": hashes(runs),
    }
    title = f"Unlearning: {', '.join(runs)}"
    style = resources.files("clue_fast.html_report").joinpath("report.css").read_text(encoding="utf-8")
    links = [element("li", element("a", name, href=f"#{_anchor(name)}")) for name in sections]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element("header", element("h1", title), element("p", _versions(results), class_="note")),
        _facts(columns, results) if len(runs) == 1 else None,
        element("nav", element("ul", *links), aria_label="Contents"),
        element(
            "main",
            *(
                element("section", element("h2", name), content, id=_anchor(name), aria_label=name)
                for name, content in sections.items()
            ),
        ),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def run_names(folders: Sequence[str | os.PathLike[str]]) -> dict[str, Path]:
    """What a report calls the run in each folder: its name, with as much of its path as tells it from the others."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    depth = next(depth for depth in range(1, 100) if len({path.parts[-depth:] for path in paths}) == len(paths))
    return {"/".join(path.parts[-depth:]): path for path in paths}


def describe_data(sets: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """How many records each set has, their hash, and what they ask and answer, as ``results.json`` keeps it."""
    return {
        "data": {name: {"records": len(own), "hash": data_hash(own)} for name, own in sets.items()},
        "records": {
            name: [{"question": record.prompt, "answer": record.completion} for record in own]
            for name, own in sets.items()
        },
    }


def site_counts(selection: Selection) -> list[dict[str, Any]]:
    """How many units of each site are selected, and of which category, as ``results.json`` keeps it."""
    return [
        {
            "path": site.path,
            "kind": site.kind,
            "layer": site.layer,
            "width": site.width,
            "selected": len(selection.units(site)),
            **{
                name: int((selection.categories[site] == number).sum())
                for number, name in enumerate(CATEGORIES)
                if number
            },
        }
        for site in selection.sites
    ]


def _versions(results: Sequence[Mapping[str, Any]]) -> str:
    made = sorted({str(one["clue_fast"]) for one in results if "clue_fast" in one})
    return f"clue-fast {' and '.join(made) or __version__}. Everything shown is in the results beside this page."


def _facts(columns: Sequence[Column], results: Sequence[Mapping[str, Any]]) -> Markup:
    """What a run comes to, in a few numbers."""
    after = next((column for column in columns if column.stage in ("after", "model")), columns[-1])
    before = next((column for column in columns if column.stage == "before"), None)
    forget = forget_set(columns)
    own = after.figures[forget]
    facts = [("forget questions no longer answered", f"{1 - own['answered']:.1%}", f"of {own['count']}")]
    for name, figures in after.figures.items():
        if name in others_of(columns):
            first = before.figures[name]["rouge_recall"] if before is not None and name in before.figures else 1.0
            kept = f"{figures['rouge_recall'] / first:.1%}" if first else "-"
            note = f"of the recall before, {figures['count']} records" if before else f"recall of {figures['count']}"
            facts.append((f"kept on {spoken(name)}", kept, note))
    worst = max((attempt for _, attempt in attempts_of(after)), key=lambda one: one["answered"], default=None)
    if worst is not None:
        facts.append(("answered under the strongest attack", f"{worst['answered']:.1%}", worst["variant"]))
    if selection := results[0].get("selection"):
        units, of = selection["units"], selection["of"]
        facts.append(("units selected", f"{units / of:.1%}", f"{units} of {of}"))
    if weights := results[0].get("weights"):
        outside = str(weights["changed_outside"])
        facts.append(("weights changed outside the selection", outside, f"of {weights['total']} in all"))
    boxes = (
        element("div", element("dt", name), element("dd", value, element("small", note))) for name, value, note in facts
    )
    return element("dl", *boxes, class_="facts")


def _side_by_side(parts: Iterable[Markup]) -> Markup:
    return element("div", *(element("div", part) for part in parts), class_="charts")


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
