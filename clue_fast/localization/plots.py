"""Looking at a localization: figures of matplotlib, to be saved or shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from clue_fast.errors import SelectionError
from clue_fast.localization.circuit import Discovery
from clue_fast.localization.circuit.gates import ADDER, AND, OR
from clue_fast.localization.circuit.graph import EMBEDDING, OUTPUT
from clue_fast.selection import CATEGORIES, CONFLICT, FORGET, IRRELEVANT, RETAIN, Scores, Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(site.kind for site in selection.sites))
    figure = Figure(figsize=(6.0, 1.0 + 2.6 * len(kinds)), layout="constrained")
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
    """Histogram of the scores of all units, and where the selection begins: one line, or one a site."""
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
    from matplotlib.figure import Figure

    size = 1.8 + 0.55 * len(names)
    figure = Figure(figsize=(size + 1.0, size), layout="constrained")
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
    import networkx
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    circuit = discovery.circuits[name]
    positions = _positions(discovery, circuit.nodes)
    rows = len({y for _, y in positions.values()})
    columns = max(x for x, _ in positions.values()) - min(x for x, _ in positions.values())
    figure = Figure(figsize=(max(6.0, 2.0 + 0.9 * columns), max(4.0, 1.0 + 0.6 * rows)), layout="constrained")
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 4.0), layout="constrained")
    return figure, figure.subplots()
