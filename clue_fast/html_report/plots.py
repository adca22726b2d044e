"""The pictures of a report: forget against retain, distributions, units by layer, training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clue_fast.html_report.columns import Column, forget_set, missing, others_of, spoken
from clue_fast.html_report.svg import Axis, Markup, Series, bars, chart, element, joined, percent
from clue_fast.reliability import Reliability
from clue_fast.selection import RELIABILITY

LINES = {"forget": ("c1", "square", None), "retain": ("c2", "triangle", "8 4"), "held_out": ("c4", "circle", "2 4")}
"""Color, marker and dashes of each set over the training."""


def pareto(columns: Sequence[Column]) -> Markup:
    """One point a model: what is forgotten against what is kept."""
    forget = forget_set(columns)
    others = others_of(columns)
    if not others:
        return missing("No set that is to be kept was measured.")
    kept = "held_out" if "held_out" in others else others[0]
    points = {
        column: (1.0 - column.figures[forget]["answered"], column.figures[kept]["rouge_recall"])
        for column in columns
        if {forget, kept} <= column.figures.keys()
    }
    lowest = min([0.8, *(math.floor(10 * recall - 0.5) / 10 for _, recall in points.values())])
    x = Axis(f"{spoken(forget)} questions no longer answered", -0.03, 1.03, percent)
    y = Axis(f"ROUGE-L recall, {spoken(kept)}", max(0.0, lowest), 1.02, percent)
    series = [column.series([point], line="") for column, point in points.items()]
    front = _front([point for column, point in points.items() if column.stage in ("after", "model", "trained")])
    if len(front) > 1:
        series.insert(0, Series("best of these (Pareto front)", front, "c0", "", "straight", "3 3"))
    told = "; ".join(f"{own.name}: {a:.1%} forgotten, {b:.1%} kept" for own, (a, b) in points.items())
    apart = ", which took no part in scoring or training" if kept == "held_out" else ""
    caption = f"Up and to the right is better. What is kept is measured on the {spoken(kept)} records{apart}."
    return chart(f"What is forgotten against what is kept. {told}.", x, y, series, caption)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both, by what is forgotten."""
    return sorted({p for p in points if not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points)})


def distributions(columns: Sequence[Column]) -> Markup:
    """Truth ratios and answer probabilities of the forget records, as cumulative shares."""
    forget = forget_set(columns)
    charts = []
    if ratios := _by_record(columns, forget, "truth_ratios"):
        every = [max(value, 1e-12) for own in ratios.values() for value in own]
        low = 10.0 ** max(-6, math.floor(math.log10(min(every))))
        high = 10.0 ** min(6, math.ceil(math.log10(max(every))))
        x = Axis("truth ratio R", low, max(high, 10 * low), _power, logarithmic=True)
        caption = (
            "R is the likelihood of wrong answers over that of the right one, far below 1 for a model that knows. "
            "Forgetting is complete where the line is that of the retrained model, which forget quality tests."
        )
        charts.append(_cumulative("truth ratio R", x, ratios, caption))
    else:
        charts.append(missing("No truth ratios: the forget records have no wrong answers (column perturbed_answer)."))
    if losses := _by_record(columns, forget, "losses"):
        likely = {column: [math.exp(-loss) for loss in own] for column, own in losses.items()}
        caption = "exp(-loss) of the right answer: a line that rises at the left is that of a model that does not know."
        charts.append(_cumulative("answer probability", Axis("answer probability", 0, 1), likely, caption))
    return element("div", *charts, class_="charts")


def _by_record(columns: Sequence[Column], name: str, figure: str) -> dict[Column, list[float]]:
    """The finite values of the records of a set, of each model that has them."""
    every = {column: column.figures.get(name, {}).get(figure, []) for column in columns}
    finite = {column: [value for value in own if math.isfinite(value)] for column, own in every.items()}
    return {column: own for column, own in finite.items() if own}


def _cumulative(what: str, x: Axis, values: Mapping[Column, Sequence[float]], caption: str) -> Markup:
    series = []
    for column, own in values.items():
        steps = [(value, (index + 1) / len(own)) for index, value in enumerate(sorted(own))]
        series.append(column.series([(x.low, 0.0), *steps, (x.high, 1.0)], "steps", marker=False))
    medians = "; ".join(f"{column.name}: {sorted(own)[len(own) // 2]:.3g}" for column, own in values.items())
    y = Axis("share of the forget records", 0, 1, percent)
    return chart(f"Distribution of the {what} over the forget records. Medians: {medians}.", x, y, series, caption)


def _power(value: float) -> str:
    return f"{value:g}" if 1e-3 <= value <= 1e3 else f"{value:.0e}"


def units_by_layer(name: str, results: Mapping[str, Any]) -> Markup:
    """How many units of each layer are selected, by kind and category; the name is that of one run of several."""
    selection = results.get("selection")
    if not selection:
        return missing(f"{name or 'This evaluation'}: nothing was selected here, only a model measured.")
    lines = [f"{name + ': ' if name else ''}{selection['units']} of {selection['of']} units are selected."]
    if RELIABILITY in selection:
        sentence = Reliability.from_dict(selection[RELIABILITY]).sentence
        lines.append(f"{sentence[:1].upper()}{sentence[1:]}.")
    parts = [element("p", " ".join(lines))]
    sites = selection.get("sites", [])
    for kind in dict.fromkeys(site["kind"] for site in sites):
        parts.append(_bars_of(kind, [site for site in sites if site["kind"] == kind]))
    if not sites:
        parts.append(missing("In which layers is not known: the results were written by an earlier version."))
    return joined(parts)


def _bars_of(kind: str, sites: Sequence[Mapping[str, Any]]) -> Markup:
    layers = sorted({site["layer"] for site in sites})
    named = (("forget", "c1"), ("conflict", "c5"), ("retain", "c2"))
    used = [(category, color) for category, color in named if any(site[category] for site in sites)]
    columns = [
        (layer, [sum(site[category] for site in sites if site["layer"] == layer) for category, _ in used])
        for layer in layers
    ]
    most = max(sum(heights) for _, heights in columns)
    told = ", ".join(f"layer {layer}: {sum(heights)}" for layer, heights in columns)
    width = sum(site["width"] for site in sites if site["layer"] == layers[0])
    x = Axis("layer", layers[0] - 0.5, layers[-1] + 0.5)
    y = Axis(f"units selected ({kind})", 0, max(most, 1) * 1.08)
    caption = f"Of {width} {kind} units in a layer." if len({site["width"] for site in sites}) == 1 else None
    return bars(f"Selected {kind} units by layer. {told}.", x, y, columns, used, caption)


def training(name: str, results: Mapping[str, Any]) -> Markup:
    """Loss and recall over the steps; the name is that of one run of several."""
    history = results.get("history")
    if not history:
        return missing(f"{name or 'This evaluation'}: no training is recorded.")
    charts = []
    for suffix, title in (("loss", "training loss"), ("recall", "ROUGE-L recall")):
        series = []
        for own, (color, marker, dashes) in LINES.items():
            points = [(entry["step"], entry[f"{own}_{suffix}"]) for entry in history if f"{own}_{suffix}" in entry]
            shape = marker if suffix == "recall" else ""
            series += [Series(spoken(own), points, color, shape, "straight", dashes)] if points else []
        if not series:
            charts.append(missing(f"{name + ': ' if name else ''}no {title} on the way; see --evaluate-every."))
            continue
        x = Axis("step", 0, max(1, *(step for one in series for step, _ in one.points)))
        most = max(value for one in series for _, value in one.points)
        y = Axis(title, 0, 1.0, percent) if suffix == "recall" else Axis(title, 0, most or 1.0)
        ends = ((one.name, one.points[0][1], one.points[-1][1]) for one in series)
        told = "; ".join(f"{own}: {first:.3g} at first, {last:.3g} at last" for own, first, last in ends)
        charts.append(chart(f"{title} over the steps. {told}.", x, y, series, name or None))
    return element("div", *charts, class_="charts")
