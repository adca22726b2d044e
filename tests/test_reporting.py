"""The report: what the table says, and plots that show something."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread

from clue_fast.cli import main
from clue_fast.errors import ExtraError, FileFormatError
from clue_fast.evaluation import Metrics
from clue_fast.reporting import (
    category_figure,
    evaluation_table,
    load_results,
    model_card,
    results_table,
    write_plots,
)
from clue_fast.selection import CONFLICT, Selection
from clue_fast.sites import Site
from clue_fast.statistics import Statistics

SITES = [
    Site(f"layers.{layer}.mlp", "mlp", 12, layer, f"{layer}.gate", f"{layer}.up", f"{layer}.down", "silu")
    for layer in range(3)
]
HISTORY = [
    {"step": 0, "forget_recall": 1.0, "retain_recall": 0.9, "held_out_recall": 0.8},
    {"step": 1, "loss": 3.0, "forget_loss": 2.0, "retain_loss": 1.0},
    {"step": 2, "loss": 2.5, "forget_loss": 1.5, "retain_loss": 1.0},
    {"step": 2, "forget_recall": 0.1, "retain_recall": 0.9, "held_out_recall": 0.7},
]


def results() -> dict[str, Any]:
    def figures(answered: float, recall: float) -> dict[str, Any]:
        return Metrics(5, 1.0, 0.5, 0.25, recall, answered).as_dict()

    return {
        "evaluation": {
            "before": {"forget": figures(1.0, 0.9), "retain": figures(1.0, 0.8), "held_out": figures(1.0, 0.0)},
            "after": {"forget": figures(0.2, 0.1), "retain": figures(1.0, 0.6), "held_out": figures(0.8, 0.0)},
        },
        "selection": {"units": 3, "of": 36, "hash": "f"},
        "weights": {"total": 1000, "trained": 50, "changed_inside": 49, "changed_outside": 0},
        "seconds": {"train": 12.34},
    }


def make_selection() -> Selection:
    categories = {site: torch.zeros(12, dtype=torch.int8) for site in SITES}
    for site, units in zip(SITES, ([0, 5], [3], []), strict=True):
        categories[site][units] = CONFLICT
    return Selection(SITES, categories, {site: torch.rand(12) for site in SITES}, {}, "f")


def make_statistics() -> Statistics:
    statistics = Statistics(SITES, "f")
    statistics.values.copy_(torch.rand(statistics.values.shape, generator=torch.Generator().manual_seed(0)))
    statistics.count.fill_(7)
    return statistics


CARD = {
    "clue_fast": "1.2",
    "settings": {"criterion": "difference"},
    "data": {"forget": {"records": 5, "hash": "abc"}},
}


class TestModelCard:
    def test_says_what_was_forgotten_and_how_to_load_it_and_nothing_of_the_data(self) -> None:
        told = results() | CARD
        told["evaluation"]["after"]["forget"]["answers"] = ["Ada lives in Paris"]
        card = model_card(told, "someone/model", "unlearned")
        assert card.startswith("---\n") and "base_model: someone/model\n" in card
        for line in ("| forget | 5 | `abc` |", '  "criterion": "difference"', "# model, unlearned"):
            assert line in card.splitlines()
        assert "50 of its 1000 weights" in card and '.from_pretrained("unlearned")' in card
        assert "| forget   | questions answered  |" in card
        assert "The license is that of the base model." in card and "Ada" not in card

    def test_a_path_of_this_machine_is_no_base_model(self, tmp_path: Path) -> None:
        card = model_card(results() | CARD, str(tmp_path / "secret"))
        assert "base_model" not in card and "secret" not in card and "# Unlearned model" in card


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ExtraError, match=r'plots need matplotlib; install it with: pip install "clue-fast\[plots\]"'):
        category_figure(make_selection())


class TestTable:
    def test_says_what_became_of_every_set(self) -> None:
        table = results_table(results())
        for line in (
            "forget questions no longer answered: 80.0%",
            "recall kept on retain: 75.0% of before",
            "recall kept on held out: - of before",
            "units selected: 3 of 36 (8.3%)",
            "weights trained: 50 of 1000 (5.0%), changed: 49",
            "weights changed outside the selection: 0",
            "seconds: train 12.3",
        ):
            assert line in table.splitlines()

    def test_of_a_file_equals_that_of_the_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "results.json").write_text(json.dumps(results()))
        assert results_table(load_results(tmp_path)) == results_table(results())
        assert main(["report", str(tmp_path)]) == 0
        assert capsys.readouterr().out.strip() == results_table(results())

    def test_of_results_of_an_earlier_release(self, tmp_path: Path) -> None:
        """``reference`` is the retrained model, and ``shrinking`` with ``update_kept`` how the update was scaled."""
        scaling = {"unanswered": 1.0, "forget_target": 0.9, "validation": [1, 2], "reported": [3, 4], "rewordings": 0}
        old, new = results(), results()
        for found, name in ((old, "reference"), (new, "retrained")):
            for figures in found["evaluation"].values():
                figures["forget_reported"] = figures["forget"]
            found["evaluation"]["trained"] = found["evaluation"][name] = found["evaluation"]["after"]
        old["shrinking"] = {**scaling, "update_kept": 0.4}
        new["scaling"] = {**scaling, "update_scale": 0.4}
        (tmp_path / "results.json").write_text(json.dumps(old))
        table = results_table(load_results(tmp_path))
        assert table == results_table(new)
        assert "update scale: 40.0%; of the 2 questions that decided, 100.0% are not answered" in table
        assert "retrained |" in table

    def test_of_an_evaluation(self) -> None:
        of_model = {"forget": Metrics(5, 1.0, 0.5, 0.25, 0.75, 1.0, 0.125).summary()}
        lines = evaluation_table({"model": of_model, "retrained": of_model}).splitlines()
        assert lines[0].split() == ["set", "metric", "model", "retrained"]
        assert ["forget", "truth", "ratio", "0.125", "0.125"] in [line.split() for line in lines]
        assert len({len(line) for line in lines}) == 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "holds no results.json"),
            ("{", "cannot be read"),
            ("[]", "holds no results of"),
            ("{}", "holds no results of"),
        ],
    )
    def test_no_results(self, tmp_path: Path, content: str | None, message: str) -> None:
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        with pytest.raises(FileFormatError, match=message):
            load_results(tmp_path)

    def test_incomplete_results(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        broken = copy.deepcopy(results())
        del broken["weights"]
        (tmp_path / "results.json").write_text(json.dumps(broken))
        assert main(["report", str(tmp_path)]) == 2
        error = capsys.readouterr().err.strip()
        assert "results.json" in error and "\n" not in error


class TestPlots:
    def test_are_all_there_and_show_something(self, tmp_path: Path) -> None:
        plots = write_plots(tmp_path, make_selection(), make_statistics(), HISTORY)
        assert {path.name for path in plots} == {"selection.png", "scores.png", "training.png"}
        for path in plots:
            pixels = imread(path)
            assert pixels.shape[0] >= 400 and pixels.shape[1] >= 600
            colors = {tuple(pixel) for pixel in pixels[..., :3].reshape(-1, 3)[::7].round(2).tolist()}
            assert len(colors) > 10

    def test_without_statistics_no_scores(self, tmp_path: Path) -> None:
        for statistics in (None, Statistics(SITES, "f")):
            names = {path.name for path in write_plots(tmp_path, make_selection(), statistics, HISTORY)}
            assert names == {"selection.png", "training.png"}

    def test_draw_what_was_measured(self) -> None:
        """Bars are units of each layer; points are units, selected ones apart; lines are the losses and recalls."""
        from matplotlib.figure import Figure

        from clue_fast import reporting as report

        axes = Figure().subplots()
        report._draw_layers(axes, make_selection())
        assert [bar.get_height() for bar in axes.patches] == [2, 1, 0]

        axes = Figure().subplots()
        statistics = make_statistics()
        report._draw_scores(axes, make_selection(), statistics)
        other, selected = axes.collections
        assert (len(other.get_offsets()), len(selected.get_offsets())) == (33, 3)
        expected = [statistics.of(SITES[1], group).abs_mean[3].item() for group in ("retain", "forget")]
        assert selected.get_offsets()[2].tolist() == pytest.approx(expected)

        losses, recalls = report._training_figure(HISTORY).axes
        assert {line.get_label(): line.get_ydata().tolist() for line in losses.lines} == {
            "forget": [2.0, 1.5], "retain": [1.0, 1.0],
        }  # fmt: skip
        assert {line.get_label(): line.get_ydata().tolist() for line in recalls.lines} == {
            "forget": [1.0, 0.1], "retain": [0.9, 0.9], "held_out": [0.8, 0.7],
        }  # fmt: skip

    def test_a_run_without_history(self, tmp_path: Path) -> None:
        assert len(write_plots(tmp_path, make_selection(), None, [])) == 2
