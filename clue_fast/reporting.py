"""Tables and figures: what an unlearning run prints and leaves beside its checkpoint, and a localization to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clue_fast.criteria.circuit import Discovery
from clue_fast.criteria.circuit.graph import ADDER, AND, EMBEDDING, OR, OUTPUT
from clue_fast.errors import ExtraError, FileFormatError, SelectionError
from clue_fast.evaluation import METRICS, Comparison, Metrics, compare, metric_title
from clue_fast.evaluation.registry import UNSEEN
from clue_fast.reliability import Reliability
from clue_fast.selection import CATEGORIES, CONFLICT, FORGET, IRRELEVANT, RELIABILITY, RETAIN, Scores, Selection
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = "results.json"
_COLORS = {"forget": "#c0392b", "retain": "#2471a3", "held_out": "#7d8c99", "selected": "#e08e0b"}


def results_table(results: Mapping[str, Any]) -> str:
    """Returns the table of a run: every set and metric before and after unlearning, and of the retrained model.

    Questions answered is the share whose greedy answer has a ROUGE-L recall of at least 0.5; next-token accuracy is
    teacher-forced.
    """
    results = renewed(results)
    evaluation = {stage: read_metrics(metrics) for stage, metrics in results["evaluation"].items()}
    comparison = compare(
        evaluation["before"], evaluation["after"], evaluation.get("retrained"), evaluation.get("trained")
    )
    selection, weights = results["selection"], results["weights"]
    lines = [comparison.table(), ""]
    lines += _forgotten(comparison, results.get("scaling"))
    for name, metrics in evaluation["before"].items():
        if metrics.text:
            row = comparison.row(name, "perplexity")
            lines.append(f"perplexity on the text: {row.after / row.before:.3f} of before")
        elif not name.startswith("forget") and name != UNSEEN:
            kept = comparison.row(name, "rouge_recall").kept
            lines.append(f"recall kept on {name.replace('_', ' ')}: {'-' if kept is None else f'{kept:.1%}'} of before")
    lines += [
        f"units selected: {selection['units']} of {selection['of']} ({selection['units'] / selection['of']:.1%})",
        *([Reliability.from_dict(selection[RELIABILITY]).sentence] if RELIABILITY in selection else []),
        f"weights trained: {weights['trained']} of {weights['total']} ({weights['trained'] / weights['total']:.1%}), "
        f"changed: {weights['changed_inside']}",
        f"weights changed outside the selection: {weights['changed_outside']}",
        *_schedule_lines(results.get("settings", {})),
        *_skipped_lines(results["evaluation"]["after"]),
        "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in results["seconds"].items()),
    ]
    return "\n".join(lines)


def _schedule_lines(settings: Mapping[str, Any]) -> list[str]:
    """Which settings of a run are of a published schedule, and which of its stages had nothing to train."""
    lines = []
    if published := settings.get("published"):
        own = {**published["settings"], "epochs": " + ".join(map(str, published["settings"]["epochs"]))}
        kept = ", ".join(f"{name} {value}" for name, value in own.items() if name not in published["changed"])
        changed = ", ".join(f"{name} {settings[name]} (published: {own[name]})" for name in published["changed"])
        lines.append(f"schedule {published['schedule']}, as in {published['source']}: {kept}")
        lines += [f"changed from it: {changed}"] if changed else []
    lines += [
        f"stage skipped: {' and '.join(units)} units, of which the selection has none"
        for units in settings.get("skipped_stages", [])
    ]
    return lines


def _forgotten(comparison: Comparison, scaling: Mapping[str, Any] | None) -> list[str]:
    """What was forgotten; where a target decided, of the questions that it was not decided on, and of all."""
    whole = comparison.row("forget", "answered")
    if scaling is None:
        return [f"forget questions no longer answered: {1.0 - whole.after:.1%}"]
    row = comparison.row("forget_reported", "answered")
    number = {part: len(scaling[part]) for part in ("reported", "validation")}
    reworded = f" and {scaling['rewordings']} rewordings" if scaling["rewordings"] else ""
    lines = [
        f"forget questions no longer answered, {when}: {1.0 - reported:.1%} of the {number['reported']} that scaling "
        f"did not look at, {1.0 - every:.1%} of all {sum(number.values())}"
        for when, reported, every in (
            ("after training", row.trained or 0.0, whole.trained or 0.0),
            ("after scaling", row.after, whole.after),
        )
    ]
    return [
        *lines,
        f"update scale: {scaling['update_scale']:.1%}; of the {number['validation']} questions{reworded} that decided, "
        f"{scaling['unanswered']:.1%} are not answered, {scaling['forget_target']:.1%} were asked for",
    ]


def renewed(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """Results with the names of today for those of an earlier release."""
    evaluation = dict(results["evaluation"])
    if "reference" in evaluation:
        evaluation["retrained"] = evaluation.pop("reference")
    if "shrinking" not in results:
        return {**results, "evaluation": evaluation}
    scaling = {"update_scale" if name == "update_kept" else name: own for name, own in results["shrinking"].items()}
    rest = {name: value for name, value in results.items() if name != "shrinking"}
    return {**rest, "evaluation": evaluation, "scaling": scaling}


def evaluation_table(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of ``evaluate_model``: a row per set and metric, a column a model."""
    columns = list(evaluation)
    body = []
    for name, figures in evaluation[columns[0]].items():
        for metric in METRICS:
            # Figures of an earlier version may lack a metric, and those of a retrained model what compares with it.
            values = [evaluation[column][name].get(metric) for column in columns]
            if values[0] is not None:
                body.append((name, metric_title(metric, figures), *map(_figure_of, values)))
    widths = [max(10, *(len(row[0]) for row in body)), max(20, *(len(row[1]) for row in body))]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}" + "".join(f"{cell:>12}" for cell in row[2:])
        for row in [("set", "metric", *columns), *body]
    ]
    return "\n".join([*lines, *_skipped_lines(evaluation[columns[0]])])


def _figure_of(value: float | None) -> str:
    """Three digits behind the point, and a p-value that has none there as a power of ten."""
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) >= 5e-4 or value == 0 else f"{value:.1e}"


def _skipped_lines(evaluation: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which metrics have no value, of which sets, and why; those that share sets and reason in one line."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name, figures in evaluation.items():
        for metric, reason in figures.get("skipped", {}).items():
            sets.setdefault((metric, reason), []).append(name.replace("_", " "))
    lines: dict[tuple[str, str], list[str]] = {}
    for (metric, reason), names in sets.items():
        title = metric_title(metric, {}) if metric in METRICS else metric
        lines.setdefault((", ".join(names), reason), []).append(title)
    return [f"skipped: {', '.join(titles)} ({names}): {reason}" for (names, reason), titles in lines.items()]


def read_metrics(evaluation: Mapping[str, Mapping[str, Any]]) -> dict[str, Metrics]:
    """Turns the figures of one evaluation, as they stand in the results, back into Metrics by set."""
    return {name: Metrics.from_dict(figures) for name, figures in evaluation.items()}


def load_results(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the results of a run. Raises FileFormatError if the folder holds none."""
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{folder} holds no {RESULTS}; name the output folder of an unlearning run") from error
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{path} cannot be read: {error}") from error
    if not isinstance(results, dict) or not {"evaluation", "selection", "weights", "seconds"} <= results.keys():
        raise FileFormatError(f"{path} holds no results of an unlearning run; name the output folder of one")
    return dict(renewed(results))


CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- unlearning
- clue-fast
{base}---

# {title}

This model was made to forget a data set by clue-fast {version}: {trained} of its {total} weights were trained, those of
{units} of {of} units, and no other weight has changed its bits{outside}.

| data | records | hash |
|---|---:|---|
{data}

The hash is of what the records say. The records and what was answered to them stand in `results.json` and
`report.html`: leave both out where this folder is published.

## Measured

{table}

"Retrained" is a model that was trained without the forget set, where one was given. That a question is no longer
answered does not prove that the answer is gone: relearning can bring it back.

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

`clue_fast.Selection.from_pretrained("{folder}")` has the units that were trained, `results.json` everything measured.

## Settings

```json
{settings}
```

The license is that of the base model.
"""
"""The card of a model that has unlearned."""


def model_card(results: Mapping[str, Any], base: str = "", folder: str = "unlearned") -> str:
    """Returns the card of a run: what was forgotten, by its hash, the settings, the table, and how to load it.

    Args:
        results: of the run.
        base: name of the model that it began with; a path of this machine is left out.
        folder: what the card calls the folder that it stands in.
    """
    weights, selection = results["weights"], results["selection"]
    of_hub = bool(base) and not Path(base).is_absolute() and base.count("/") <= 1 and not Path(base).exists()
    changed = weights["changed_outside"]
    rows = (
        f"| {name.replace('_', ' ')} | {own['records']} | `{own['hash']}` |" for name, own in results["data"].items()
    )
    evaluation = {stage: read_metrics(figures) for stage, figures in results["evaluation"].items()}
    compared = compare(
        evaluation["before"], evaluation["after"], evaluation.get("retrained"), evaluation.get("trained")
    )
    return CARD.format(
        base=f"base_model: {base}\n" if of_hub else "",
        title=f"{base.rsplit('/', 1)[-1]}, unlearned" if of_hub else "Unlearned model",
        version=results["clue_fast"],
        trained=weights["trained"],
        total=weights["total"],
        units=selection["units"],
        of=selection["of"],
        outside="" if not changed else f" but {changed}",
        data="\n".join(rows),
        table=compared.table(),
        folder=folder,
        settings=json.dumps(results["settings"], indent=2, default=str),
    )


def write_model_card(folder: Path, results: Mapping[str, Any], base: str, name: str) -> None:
    """Writes ``README.md``, the card of a run, into the folder of its checkpoint."""
    (folder / "README.md").write_text(model_card(results, base, name), encoding="utf-8")


def write_plots(
    folder: Path, selection: Selection, statistics: Statistics | None, history: Sequence[Mapping[str, float]]
) -> list[Path]:
    """Draws the plots of a run and returns their files.

    Selected units by layer; how a unit acts on forget against retain data, a point a unit (where statistics were
    recorded); losses and recall over the training steps.
    """
    plots = {"selection.png": _figure(_draw_layers, selection), "training.png": _training_figure(history)}
    if statistics is not None and int(statistics.count.min()) > 0:
        plots["scores.png"] = _figure(_draw_scores, selection, statistics)
    for name, figure in plots.items():
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in plots]


def _figure(draw: Any, *data: Any) -> Figure:
    figure = _new_figure(6.0, 4.0)
    draw(figure.subplots(), *data)
    return figure


def _draw_layers(axes: Axes, selection: Selection) -> None:
    layers = [site.layer for site in selection.sites]
    axes.bar(layers, [len(selection.units(site)) for site in selection.sites], color=_COLORS["selected"])
    axes.set(
        xlabel="layer",
        ylabel="units selected",
        xticks=layers,
        title=f"{len(selection)} selected units by layer",
    )


_DRAWN = {"abs_mean": "mean |activation|", "mean": "mean activation", "abs_attribution": "mean |a · slope|"}


def _draw_scores(axes: Axes, selection: Selection, statistics: Statistics) -> None:
    forget, retain, chosen = list[float](), list[float](), list[bool]()
    drawn = next(n for n in _DRAWN if not any(n in statistics.left_out(group) for group in DEFAULT_GROUPS))
    for site in selection.sites:
        on_forget, on_retain = (getattr(statistics.of(site, group), drawn).tolist() for group in DEFAULT_GROUPS)
        forget, retain = forget + on_forget, retain + on_retain
        chosen += (selection.categories[site] != 0).tolist()
    for label, wanted, color, size in (
        ("other", False, "#b8c4cc", 4),
        ("selected", True, _COLORS["selected"], 10),
    ):
        points = [(r, f) for r, f, c in zip(retain, forget, chosen, strict=True) if c is wanted]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=size, color=color, label=f"{label} ({len(points)})", linewidths=0)
    ends = min([*forget, *retain, 0.0]), max([*forget, *retain, 1e-6])
    axes.plot(ends, ends, color="#55606a", linewidth=0.8, linestyle="--")
    axes.set(xlabel=f"{_DRAWN[drawn]} on retain", ylabel=f"{_DRAWN[drawn]} on forget", title="Units")
    axes.legend(frameon=False)


def _training_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    figure = _new_figure(10.0, 4.0)
    losses, recalls = figure.subplots(1, 2)
    for axes, suffix, title in ((losses, "loss", "Training loss"), (recalls, "recall", "ROUGE-L recall")):
        for name, color in _COLORS.items():
            points = [(entry["step"], entry[f"{name}_{suffix}"]) for entry in history if f"{name}_{suffix}" in entry]
            if points:
                axes.plot(*zip(*points, strict=True), color=color, label=name, marker="o", markersize=3)
        axes.set(xlabel="step", title=title)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False)
    recalls.set_ylim(-0.02, 1.02)
    return figure


COLORS = {"irrelevant": "#b8c4cc", "forget": "#c0392b", "retain": "#2471a3", "conflict": "#e08e0b"}
GATE_COLORS = {AND: "#1e8449", OR: "#7d3c98", ADDER: "#55606a"}


def importance_figure(forget: Scores, retain: Scores, selection: Selection) -> Figure:
    """Every unit by its importance to the retain and to the forget set, in the color of its category.

    Args:
        forget, retain: importances, see ``importances``; axes are logarithmic where all are above zero.
        selection: with the categories.

    Raises:
        SelectionError: they belong to different models.
    """
    if not selection.fingerprint == forget.fingerprint == retain.fingerprint:
        raise SelectionError("the importances and the selection belong to different models")
    figure, axes = _canvas()
    x, y = (torch.cat([scores[site].cpu() for site in selection.sites]).numpy() for scores in (retain, forget))
    category = torch.cat([selection.categories[site] for site in selection.sites]).numpy()
    for number in (IRRELEVANT, RETAIN, FORGET, CONFLICT):
        chosen = category == number
        name = CATEGORIES[number]
        if chosen.any():
            size = 4 if number == IRRELEVANT else 9
            label = f"{name} ({int(chosen.sum())})"
            axes.scatter(x[chosen], y[chosen], s=size, color=COLORS[name], label=label, linewidths=0)
    if x.min() > 0 and y.min() > 0:
        axes.set(xscale="log", yscale="log")
    criterion = forget.criterion
    axes.set(xlabel=f"importance to retain ({criterion})", ylabel=f"importance to forget ({criterion})", title="Units")
    axes.legend(frameon=False)
    return figure


def category_figure(selection: Selection) -> Figure:
    """How many units of each layer are forget, conflict and retain units; a panel a kind of unit."""
    kinds = list(dict.fromkeys(site.kind for site in selection.sites))
    figure = _new_figure(6.0, 1.0 + 2.6 * len(kinds))
    panels = np.atleast_1d(figure.subplots(len(kinds), 1))
    for axes, kind in zip(panels, kinds, strict=True):
        layers = sorted({site.layer for site in selection.sites if site.kind == kind})
        base = np.zeros(len(layers))
        for number in (FORGET, CONFLICT, RETAIN):
            counts = np.zeros(len(layers))
            for site in selection.sites:
                if site.kind == kind:
                    counts[layers.index(site.layer)] += int((selection.categories[site] == number).sum())
            name = CATEGORIES[number]
            axes.bar(layers, counts, bottom=base, color=COLORS[name], label=f"{name} ({int(counts.sum())})")
            base += counts
        axes.set(xlabel="layer", ylabel=f"units ({kind})", xticks=layers)
        axes.legend(frameon=False)
    return figure


def score_figure(scores: Scores, selection: Selection) -> Figure:
    """Histogram of the scores of all units, and where the selection begins: one line, or one per site."""
    figure, axes = _canvas()
    values = torch.cat([scores[site].cpu() for site in selection.sites]).numpy()
    selected = torch.cat([(selection.categories[site] & FORGET) != 0 for site in selection.sites]).numpy()
    bins = np.histogram_bin_edges(values, bins=60)
    parts = [("other", values[~selected], "irrelevant"), ("selected", values[selected], "conflict")]
    axes.hist(
        [part for _, part, _ in parts],
        bins=list(bins),
        stacked=True,
        color=[COLORS[color] for _, _, color in parts],
        label=[f"{name} ({len(part)})" for name, part, _ in parts],
    )
    lowest = [
        float(scores[site].cpu()[(selection.categories[site] & FORGET) != 0].min())
        for site in selection.sites
        if len(selection.units(site))
    ]
    thresholds = lowest if selection.source.get("scope", "layer") == "layer" else [min(lowest, default=0.0)]
    for index, threshold in enumerate(thresholds):
        label = "threshold" + (" of each site" if len(thresholds) > 1 else "")
        axes.axvline(threshold, color="#2c3e50", linewidth=0.8, linestyle="--", label=None if index else label)
    axes.set(xlabel=scores.criterion, ylabel="units", yscale="log", title="Scores")
    axes.legend(frameon=False)
    return figure


def overlap_figure(selections: Mapping[str, Selection]) -> Figure:
    """The Jaccard index of every two selections, such as those of all criteria, or of one at several seeds."""
    names = list(selections)
    matrix = np.array([[selections[a].overlap(selections[b]) for b in names] for a in names])
    size = 1.8 + 0.55 * len(names)
    figure = _new_figure(size + 1.0, size)
    axes = figure.subplots()
    image = axes.imshow(matrix, vmin=0.0, vmax=1.0, cmap="viridis")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right")
    axes.set_yticks(range(len(names)), names)
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            color = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, label="Jaccard index of the units to train")
    return figure


def circuit_figure(discovery: Discovery, name: str) -> Figure:
    """The circuit of a data set: nodes from the embedding up to the output, edges in the color of their gate.

    Args:
        discovery: see ``discover``.
        name: of the data set, such as "forget".
    """
    try:
        import networkx
    except ImportError as error:
        raise ExtraError("figures of circuits need networkx", "circuits") from error

    circuit = discovery.circuits[name]
    positions = _positions(discovery, circuit.nodes)
    rows = len({y for _, y in positions.values()})
    columns = max(x for x, _ in positions.values()) - min(x for x, _ in positions.values())
    figure = _new_figure(max(6.0, 2.0 + 0.9 * columns), max(4.0, 1.0 + 0.6 * rows))
    from matplotlib.lines import Line2D

    axes = figure.subplots()
    graph = networkx.DiGraph(list(circuit.edges))
    colors = [COLORS[discovery.categories.get(node, "irrelevant")] for node in graph.nodes]
    networkx.draw_networkx_nodes(graph, positions, ax=axes, node_color=colors, node_size=420)
    networkx.draw_networkx_labels(graph, positions, ax=axes, font_size=6)
    for gate, color in GATE_COLORS.items():
        edges = [edge for edge, own in circuit.edges.items() if own == gate]
        networkx.draw_networkx_edges(
            graph, positions, edgelist=edges, ax=axes, edge_color=color, width=0.9, arrowsize=7, node_size=420
        )
    gates = [Line2D([], [], color=color, label=gate) for gate, color in GATE_COLORS.items()]
    nodes = [
        Line2D([], [], color=color, marker="o", linestyle="", label=category) for category, color in COLORS.items()
    ]
    axes.legend(handles=gates + nodes, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.set_title(f"circuit of the {name} set: {len(circuit.nodes)} nodes, {len(circuit.edges)} edges")
    axes.set_axis_off()
    return figure


def _positions(discovery: Discovery, nodes: list[str]) -> dict[str, tuple[float, float]]:
    """Nodes of one stage in a row, in the order of their names."""
    graph = discovery.graph
    stages = {writer.name: float(writer.stage) for writer in graph.writers}
    stages |= {reader.name: float(reader.stage) for reader in graph.readers if reader.name not in stages}
    assert EMBEDDING in stages and OUTPUT in stages
    rows: dict[float, list[str]] = {}
    for node in sorted(nodes):
        rows.setdefault(stages[node], []).append(node)
    positions: dict[str, tuple[float, float]] = {}
    for height, stage in enumerate(sorted(rows)):
        own = rows[stage]
        positions |= {node: (index - (len(own) - 1) / 2, float(height)) for index, node in enumerate(own)}
    return positions


def _canvas() -> tuple[Figure, Axes]:
    figure = _new_figure(6.0, 4.0)
    return figure, figure.subplots()


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Raises ExtraError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExtraError("plots need matplotlib", "plots") from error
    return Figure(figsize=(width, height), layout="constrained")
