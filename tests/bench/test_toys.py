"""Toys in grids: what they learn, what is asked of them, and how their runs are scored."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.files import DATA
from bench.unlearning.__main__ import load_runs, run_grid
from bench.unlearning.grid import Grid, Method, Run
from bench.unlearning.kinds import kind_of
from bench.unlearning.learned import Learned
from bench.unlearning.methods import objective_of, stages_of
from bench.unlearning.scores import TOYS as SCORING
from bench.unlearning.tables import plot, short_table, table
from bench.unlearning.toys import TOYS, Toy, tofu_authors
from clue_fast.data import Record
from clue_fast.demo.pretraining import Shape, TrainConfig
from clue_fast.selection import CATEGORIES
from clue_fast.trainer.stages import clue_stages

COLORS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")
GRID = """
model: tiny
kind: person
seeds: [0]
steps: 12
batch_size: 4
forget: 12
retain: 6
tune: 3
held_out: 3
budgets: [0.5]
rates: [0.5]
relearn_steps: 2
methods:
  retrained: {train: retrained, budgets: [1.0]}
  random: {criterion: random}
  all weights, dpo: {train: all, objective: dpo, budgets: [1.0], rates: [0.1]}
  lora, kl: {train: lora, objective: kl, budgets: [1.0], rates: [0.1]}
"""


def people(grid: Grid, seed: int) -> Learned:
    draw = random.Random(seed)
    names = [
        f"{first}{last}"
        for first in ("Ada", "Bo", "Cy", "Di", "Ed", "Flo", "Gil", "Hal")
        for last in ("kin", "mar", "ros")
    ]
    words = [draw.sample(COLORS, 4) for _ in names]
    records = [
        Record(f"What does {name} wear?", " ".join(own[:3]), perturbed=(" ".join(own[1:]),))
        for name, own in zip(names, words, strict=True)
    ]
    first, second, third = grid.forget, grid.forget + grid.retain, grid.forget + grid.retain + grid.tune
    return Learned(records[:first], records[first:second], records[second:third], records[third:])


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Grid:
    toy = Toy({"person": people}, Shape(2, 32, 64), TrainConfig(epochs=60, batch_size=6, lr=5e-3), 300)
    monkeypatch.setitem(TOYS, "tiny", toy)
    monkeypatch.setattr("bench.unlearning.__main__.RESULTS", tmp_path / "results")
    (tmp_path / "tiny.yaml").write_text(GRID)
    return Grid.load(tmp_path / "tiny.yaml")


def test_a_toy_unlearns_in_every_way_beside_the_retrained_model(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_grid(grid, tmp_path, grid.seeds)
    runs = {run["method"]: run for run in load_runs(tmp_path / "results" / "unlearning" / "tiny.jsonl")}
    assert list(runs) == list(grid.methods)
    before, retrained = runs["random"]["before"], runs["retrained"]["after"]
    for name in ("forget", "forget_tune", "retain", "held_out"):
        assert sum(before[name]["answered"]) == len(before[name]["answered"])
    assert sum(retrained["held_out"]["answered"]) == 3
    assert sum(retrained["forget"]["probability"]) < 0.5 * sum(before["forget"]["probability"])
    assert (retrained["forget_quality"], retrained["distance"]) == (1.0, 0.0)
    assert before["distance"] > 0.0 and before["model_utility"] is None  # there are no real authors
    for name, run in runs.items():
        assert sum(run["after"]["forget"]["probability"]) < sum(before["forget"]["probability"]), name
        assert list(run["relearned"]["answered"]) == ["0", "2"]
        assert {len(recalls) for recalls in run["relearned"]["recalls"].values()} == {2}
    assert (tmp_path / "tiny").is_dir() and len(list((tmp_path / "tiny").iterdir())) == 1
    monkeypatch.setattr("bench.unlearning.toys.train_model", None)  # nothing is trained again
    run_grid(grid, tmp_path, grid.seeds)
    text = table(grid, list(runs.values()))
    assert "KS p" in text and "all weights, dpo" in short_table(grid, list(runs.values()))
    plot(grid, list(runs.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_what_a_toy_is_asked_beside_what_it_learns(grid: Grid, tmp_path: Path) -> None:
    subject: Any = kind_of(grid).load(grid, tmp_path)(0)
    asked, trains = subject.learned.questions(), subject.training()
    prompts = {name: {record.prompt for record in records} for name, records in asked.items()}
    assert not prompts["forget"] & prompts["forget_tune"]
    assert prompts["forget"] | prompts["forget_tune"] == {record.prompt for record in trains["forget"]}
    assert not (prompts["tune"] | prompts["held_out"]) & {r.prompt for records in trains.values() for r in records}
    assert not {record.prompt for record in subject.learned.kept} & {record.prompt for record in trains["forget"]}
    other: Any = kind_of(grid).load(replace(grid, forget=5), tmp_path)(0)
    assert subject.hash != other.hash
    with pytest.raises(ValueError, match="tiny can forget: person; not 'rule'"):
        kind_of(grid).load(replace(grid, kind="rule"), tmp_path)


def test_only_a_toy_can_be_retrained(grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.unlearning.subjects.load_pretrained", lambda name, folder: (torch.nn.Linear(1, 1), None))
    monkeypatch.setattr("bench.unlearning.subjects.load_known", lambda *arguments: {"capital": range(30)})
    monkeypatch.setattr("bench.unlearning.subjects.load_never_known", lambda *arguments: [])
    subject = kind_of(pretrained := replace(grid, model="smollm2-135m", kind="capital")).load(pretrained, tmp_path)(0)
    with pytest.raises(ValueError, match="cannot be trained again"):
        subject.retrained()


def _run(forget: list[int], recall: list[float], curve: dict[str, list[float]]) -> Any:
    def stage(answered: list[int], recalls: list[float]) -> dict[str, Any]:
        one = {"answered": answered, "recall": recalls, "probability": [0.5] * len(answered)}
        sets = dict.fromkeys(("forget", "forget_tune", "tune", "held_out", "retain"), one)
        return {**sets, "forget_quality": 0.1, "distance": 0.2, "model_utility": None}

    before = stage([1] * len(forget), [0.8] * len(recall))
    return {"before": before, "after": stage(forget, recall), "relearned": {"recalls": curve}}


def test_runs_on_toys_are_scored_by_answers_and_recall() -> None:
    run = _run([1, 0, 0, 0], [0.2, 0.6], {"0": [0.0, 0.4], "2": [0.0, 0.9]})
    figures = SCORING.figures(run, ("forget", "held_out"))
    assert (figures.forgotten, figures.kept) == (0.75, pytest.approx(0.5))
    assert figures.score == pytest.approx(0.6)
    again = _run([0, 0, 0, 0], [1.0, 1.0], {"0": [0.1, 0.5], "2": [0.6, 0.2]})
    assert SCORING.kept(again, "held_out") == 1.0
    written = {title: column([run, again]) for title, column in SCORING.columns.items()}
    assert written["relearned"] == "0.25 0.50"
    assert (written["utility"], written["kept: retain"], written["KS p"]) == ("-", "0.750", "0.1")


def test_a_published_schedule_takes_the_steps_of_the_grid(grid: Grid) -> None:
    method = Method(stages="clue", criterion="circuit", layer_lr=1.0)
    selection: Any = SimpleNamespace(
        categories={"a": torch.tensor([CATEGORIES.index("forget"), CATEGORIES.index("conflict")])}
    )
    published = clue_stages(objective_of(method))
    for times in (1, 3):
        stages = stages_of(method, selection, 6.0 * times)
        assert [stage.epochs for stage in stages] == [times, 5 * times]
        assert [stage.objective for stage in stages] == [stage.objective for stage in published]
    assert objective_of(method).retain_weight == 1.0
    with pytest.raises(ValueError, match="the schedule clue has 6 epochs; 4 are no multiple"):
        stages_of(method, selection, 4.0)
    with pytest.raises(ValueError, match="stages is a setting of the training of units"):
        Method(train="all", stages="clue")
    assert "stages" in Run("one", method, 0.1, 1, 0).key(grid)


@pytest.mark.skipif(not (DATA / "tofu").is_dir(), reason="TOFU is not here")
def test_authors_of_tofu_stand_in_one_set_each() -> None:
    path = Path(__file__).parents[2] / "bench" / "unlearning" / "grids" / "tofu.yaml"
    grid = Grid.load(path)
    names = ("forget", "retain", "tune", "held_out")
    authors = {json.dumps([r.prompt for r in author]) for author in _authors_of_files()}
    for seed in range(5):
        learned = tofu_authors(grid, seed)
        assert {name: len(getattr(learned, name)) for name in names} == {name: getattr(grid, name) for name in names}
        records = [record for name in names for record in getattr(learned, name)] + learned.kept[-60:]
        assert len({record.prompt for record in records}) == len(records)
        for name in names:
            own = getattr(learned, name)
            for start in range(0, len(own), 10):
                asked = {record.prompt for record in own[start : start + 10]}
                assert any(asked <= set(json.loads(author)) for author in authors)
    with pytest.raises(ValueError, match="in multiples of 10"):
        tofu_authors(replace(grid, tune=15), 0)
    with pytest.raises(ValueError, match="more than 10 authors to forget and 20 others"):
        tofu_authors(replace(grid, held_out=100), 0)
    with pytest.raises(ValueError, match="other_retain and other_tune"):
        tofu_authors(replace(grid, other_tune=6), 0)


def _authors_of_files() -> list[list[Record]]:
    from clue_fast.data import load_records

    files = (load_records(DATA / "tofu" / f"{name}.json", name) for name in ("forget05", "retain99"))
    return [records[start : start + 20] for records in files for start in range(0, len(records), 20)]
