"""Figures show what they are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clue_fast import reporting as plots
from clue_fast.criteria.circuit import Circuit, Discovery, EdgeScores, Solution
from clue_fast.errors import SelectionError
from clue_fast.selection import Scores, Selection, categorize, select

from ..test_selection import make_site
from .circuit.test_logic import GRAPH

SITES = [make_site(0, 40), make_site(0, 4, "head"), make_site(1, 40), make_site(1, 4, "head")]


def scores(seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return Scores({site: torch.rand(site.width, generator=generator) for site in SITES}, "attribution", "f" * 16)


@pytest.fixture
def selection() -> Selection:
    return categorize(scores(0), scores(1), 0.25)


def legend(axes: object) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_every_unit_is_a_point_in_the_color_of_its_category(selection: Selection, tmp_path: Path) -> None:
    figure = plots.importance_figure(scores(0), scores(1), selection)
    (axes,) = figure.axes
    points = {label.get_label().split(" (")[0]: label.get_offsets() for label in axes.collections}
    counts = torch.bincount(torch.cat(list(selection.categories.values())).long(), minlength=4).tolist()
    assert [len(points[name]) for name in ("irrelevant", "forget", "retain", "conflict")] == counts
    figure.savefig(tmp_path / "units.png")
    with pytest.raises(SelectionError, match="different models"):
        plots.importance_figure(scores(0), Scores(scores(1), "attribution", "e" * 16), selection)


def test_bars_count_the_categories_of_each_layer_and_kind(selection: Selection) -> None:
    mlp, head = plots.category_figure(selection).axes
    for axes, kind, number in ((mlp, "mlp", 10), (head, "head", 1)):
        assert axes.get_ylabel() == f"units ({kind})"
        heights = {bars.get_label().split(" (")[0]: [bar.get_height() for bar in bars] for bars in axes.containers}
        for layer in range(2):
            assert heights["forget"][layer] + heights["conflict"][layer] == number
            assert heights["retain"][layer] + heights["conflict"][layer] == number


def test_the_histogram_shows_where_the_selection_begins() -> None:
    own = scores(0)
    (axes,) = plots.score_figure(own, select(own, 0.25, scope="global")).axes
    (line,) = axes.get_lines()
    joined = torch.cat(list(own.values())).sort(descending=True).values
    assert line.get_xdata()[0] == pytest.approx(float(joined[21]))
    assert "threshold" in legend(axes)
    (axes,) = plots.score_figure(own, select(own, 0.25)).axes
    assert len(axes.get_lines()) == 4 and "threshold of each site" in legend(axes)


def test_overlaps_are_those_of_the_selections() -> None:
    selections = {name: select(scores(seed), 0.3) for name, seed in (("a", 0), ("b", 1), ("c", 0))}
    axes = plots.overlap_figure(selections).axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert shown[0] == shown[2] == "1.00"
    assert shown[1] == f"{selections['a'].overlap(selections['b']):.2f}"


def test_a_circuit_is_drawn_with_its_gates(tmp_path: Path) -> None:
    edges = {("m1", "logits"): "ADDER", ("a1.h0", "logits"): "AND", ("embed", "m1"): "OR", ("a1.h0", "m1"): "OR"}
    nothing = torch.zeros(GRAPH.valid.shape)
    discovery = Discovery(
        GRAPH,
        {"forget": EdgeScores(nothing, nothing)},
        {"forget": Circuit(edges, 4)},
        Solution({}, 0, 0),
        {"m1": "conflict", "a1.h0": "forget", "embed": "retain"},
    )
    figure = plots.circuit_figure(discovery, "forget")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"m1", "logits", "a1.h0", "embed"}
    assert legend(axes) == ["AND", "OR", "ADDER", "irrelevant", "forget", "retain", "conflict"]
    assert len(axes.patches) == len(edges)
    figure.savefig(tmp_path / "circuit.png")
    assert (tmp_path / "circuit.png").stat().st_size > 1000
