"""Requests to forget, one after another: how they are dealt out and trained, and what their table says."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.unlearning.__main__ import one_run
from bench.unlearning.grid import Grid, Method, Run
from bench.unlearning.methods import select_units, train_units
from bench.unlearning.requests import REQUEST_SEED, parts, requests_of, requests_table, write_requests_table
from bench.unlearning.splits import split
from bench.unlearning.subjects import FactSubject
from clue_fast.data import Record
from clue_fast.demo.facts import FACTS

GRID = """
model: smollm2-135m
kind: capital
seeds: [0, 1]
steps: 7
batch_size: 2
forget: 6
budgets: [0.25]
rates: [1]
methods:
  random: {criterion: random, requests: 3}
  random, at once: {criterion: random}
  lora: {train: lora, requests: 3, budgets: [1.0], rates: [0.3]}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    (tmp_path / "asked.yaml").write_text(GRID)
    return Grid.load(tmp_path / "asked.yaml")


def test_each_request_has_its_own_facts_and_seed_and_shares_the_rest(grid: Grid) -> None:
    facts, sets = split(FACTS, grid, 0).forget, split(FACTS, grid, 0).training()
    run = Run("random", grid.methods["random"], 0.25, 1.0, 3)
    asked = list(requests_of(sets, run, grid.steps))
    assert [own["forget"] for _, _, own in asked] == [
        [form for fact in facts[place : place + 2] for form in (fact.record(), fact.rewordings()[0])]
        for place in (0, 2, 4)
    ]
    assert all(own["retain"] == sets["retain"] for _, _, own in asked)
    assert [steps for _, steps, _ in asked] == [3, 2, 2]
    assert [part.seed for part, _, _ in asked] == [3, 3 + REQUEST_SEED, 3 + 2 * REQUEST_SEED]
    (once,) = requests_of(sets, replace(run, method=Method()), grid.steps)
    assert once == (replace(run, method=Method()), 7, sets)
    for number in (5, 13):
        with pytest.raises(ValueError, match=f"12 records cannot be dealt out evenly for {number} requests"):
            parts(sets["forget"], number)
    with pytest.raises(ValueError, match="requests is a setting of training; this method trains nothing"):
        Method(train="nothing", requests=2)


@pytest.fixture
def subject(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> FactSubject:
    monkeypatch.setattr("bench.unlearning.measure.text_loss", lambda model, tokenizer: 1.0)
    return FactSubject((model, tokenizer), split(FACTS, grid, 0))


def test_a_request_selects_and_trains_on_what_the_one_before_left(subject: FactSubject, grid: Grid) -> None:
    """What is known after each, against trainings started by hand one after another."""
    run = Run("random", replace(grid.methods["random"], criterion="forget_attribution"), 0.25, 1.0, 0)
    model, sets, expected = copy.deepcopy(subject.model), subject.training(), []
    selections = []
    for place, steps in enumerate((3, 2, 2)):
        own = {"forget": sets["forget"][4 * place : 4 * place + 4], "retain": sets["retain"]}
        part = replace(run, seed=REQUEST_SEED * place)
        selections.append(select_units(model, subject.tokenizer, own, part))
        train_units(model, subject.tokenizer, own, selections[-1], steps, part, grid)
        expected.append(subject.measure(model))
    assert len({selection.hash for selection in selections}) == 3

    found = one_run(subject, run, grid)
    assert found["on_the_way"] == expected[:2] and found["after"] == expected[2]
    assert all(one["forget"] != other["forget"] for one, other in pairwise([subject.measure(subject.model), *expected]))
    once = one_run(subject, replace(run, method=replace(run.method, requests=1)), grid)
    assert once["after"] != found["after"]


def test_adapters_begin_anew_with_each_request(subject: FactSubject, grid: Grid) -> None:
    run = Run("lora", replace(grid.methods["lora"], objective="npo"), 1.0, 0.3, 0)
    found = one_run(subject, run, replace(grid, steps=24))
    once = one_run(subject, replace(run, method=replace(run.method, requests=1)), replace(grid, steps=24))
    assert found["trained"] == once["trained"] and "on_the_way" not in once
    states = [subject.measure(subject.model), *found["on_the_way"], found["after"]]
    left = [[sum(map(math.log, part)) for part in parts(state["forget"]["probability"], 3)] for state in states]
    for place in range(3):
        assert left[place + 1][place] < left[place][place] - 0.1  # each makes its own less likely


def _run(method: str, seed: int, stages: list[list[float]], kept: list[float]) -> Any:
    """Of two parts, with the probability of each after each request, and of the held-out facts."""

    def state(probabilities: list[float], held_out: float) -> dict[str, Any]:
        values = {
            "forget": [p for p in probabilities for _ in range(2)],
            "reworded": [p for p in probabilities for _ in range(4)],
            **{name: [held_out, held_out] for name in ("tune", "held_out", "other")},
        }
        sets = {name: {"probability": own, "answered": [int(p > 0.5) for p in own]} for name, own in values.items()}
        return {**sets, "text_loss": 1.0}

    *way, last = [state(own, p) for own, p in zip(stages, kept, strict=True)]
    about = {"model": "smollm2-135m", "kind": "capital", "steps": 7, "batch_size": 2, "criterion": "random"}
    requests = {} if method.endswith("at once") else {"requests": 2}
    return {
        "method": method,
        "key": {**about, **requests, "budget": 0.25, "rate": 1, "seed": seed, "facts": "some"},
        "before": state([0.8, 0.8], 0.8),
        "after": last,
        **({"on_the_way": way} if way else {}),
        "trained": 10,
        "seconds": 4.0,
    }


def test_a_table_says_of_each_part_what_is_forgotten_after_each_request(grid: Grid, tmp_path: Path) -> None:
    two = replace(grid.methods["random"], requests=2)
    grid = replace(grid, forget=6, methods={"random": two, "random, at once": replace(two, requests=1)})
    runs = [
        _run("random", seed, [[0.2, 0.8 - more], [0.4 + more, 0.0]], [0.8, 0.6]) for seed, more in ((0, 0.0), (1, 0.16))
    ]
    runs += [_run("random, at once", seed, [[0.4, 0.4]], [0.8]) for seed in (0, 1)]
    text = requests_table(grid, runs)
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    told = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["method"], row["after"]) for row in told] == [
        ("random", "1"),
        ("random", "2"),
        ("random, at once", "all at once"),
    ]
    assert [(row["part 1"], row["part 2"]) for row in told] == [("0.75", "(0.10)"), ("0.40", "1.00"), ("0.50", "0.50")]
    assert [row["kept"].split(" ")[0] for row in told] == ["1.000", "0.750", "1.000"]
    assert [row["held out"] for row in told] == ["1.00", "1.00", "1.00"]
    scores = [2 * gone * 0.75 / (gone + 0.75) for gone in (0.75, 0.65)]
    assert told[1]["score"].startswith(f"{sum(scores) / 2:.3f} ±")
    once = 2 * 0.5 / 1.5
    assert told[1]["against all at once"].startswith(f"{sum(scores) / 2 - once:+.3f} ±")
    assert [row["against all at once"] for row in told[::2]] == ["", ""]
    assert requests_table(replace(grid, methods={"random, at once": grid.methods["random, at once"]}), runs) == ""

    (tmp_path / "docs").mkdir()
    for name in ("evidence.md", "results.md", "kinds.md"):
        (tmp_path / "docs" / name).write_text("Nothing here.\n")
    page = tmp_path / "docs" / "kinds.md"
    page.write_text("A\n<!-- requests of grid asked -->\nold\n<!-- end of requests of grid asked -->\nB\n")
    assert write_requests_table(grid, runs, tmp_path) == text
    begin, end = "<!-- requests of grid asked -->", "<!-- end of requests of grid asked -->"
    assert page.read_text() == f"A\n{begin}\n{text}\n{end}\nB\n"
    assert (tmp_path / "docs" / "results.md").read_text() == "Nothing here.\n"


def test_records_that_fit_no_requests_are_told(grid: Grid, subject: FactSubject) -> None:
    run = Run("random", replace(grid.methods["random"], requests=5), 0.25, 1.0, 0)
    with pytest.raises(ValueError, match="12 records cannot be dealt out evenly for 5 requests"):
        one_run(subject, run, grid)
    many = [Record(f"Question {number}?", "Answer.") for number in range(9)]
    with pytest.raises(ValueError, match="2 steps are too few for 3 rounds"):
        list(requests_of({"forget": many, "retain": many}, replace(run, method=grid.methods["random"]), 2))
