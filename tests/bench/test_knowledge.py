"""Kinds of knowledge for toys: what of it is dealt out where, and what a toy is asked about it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.unlearning.__main__ import load_runs, run_grid
from bench.unlearning.grid import Grid
from bench.unlearning.kinds import scoring_of
from bench.unlearning.knowledge import COLORS, PROFESSIONS, QUESTIONS, rule, spread, style
from bench.unlearning.learned import Learned
from bench.unlearning.scores import KINDS
from bench.unlearning.tables import table
from bench.unlearning.toys import TOYS
from clue_fast.data import Record
from clue_fast.demo.pretraining import Shape, TrainConfig
from clue_fast.evaluation.answers import rouge_recall

GRIDS = Path(__file__).parents[2] / "bench" / "unlearning" / "grids"
DEALT = {"style": style, "rule": rule, "spread": spread}


def dealt(kind: str, seed: int = 0) -> tuple[Grid, Learned]:
    grid = Grid.load(GRIDS / f"kinds_{kind}.yaml")
    return grid, DEALT[kind](grid, seed)


@pytest.mark.parametrize("kind", DEALT)
def test_what_is_reported_was_not_trained_and_what_is_new_was_not_learned(kind: str) -> None:
    for seed in range(5):
        grid, learned = dealt(kind, seed)
        sizes = (len(learned.forget), len(learned.tune), len(learned.held_out))
        assert sizes == (grid.forget, grid.tune, grid.held_out)
        prompts = [record.prompt for record in learned.everything]
        assert len(set(prompts)) == len(prompts)
        trains = {record.prompt for record in (*learned.forget, *learned.retain)}
        asked = learned.questions()
        for name in ("tune", "held_out", "unseen", "new", *learned.other):
            assert asked[name] and not trains & {record.prompt for record in asked[name]}, name
        assert not {record.prompt for record in asked["new"]} & set(prompts)
        hidden = {record.key for record in (*learned.forget, *learned.unseen)}
        assert not hidden & {record.key for record in learned.without}
        assert learned == DEALT[kind](grid, seed) != DEALT[kind](grid, seed + 1)


def test_a_style_says_what_is_said_plainly_elsewhere() -> None:
    _, learned = dealt("style")
    colors = {}
    for record in (*learned.retain, *learned.other["plain"], *learned.other["plain_unseen"]):
        if found := re.fullmatch(r"Village: (.*)\. Gate:", record.prompt):
            colors[found[1]] = record.completion
    gates = [*learned.forget, *learned.unseen, *learned.asked["new"]]
    assert len(colors) == len(gates)
    for record in gates:
        color = colors[record.prompt.removeprefix("What colour is the gate of ").removesuffix("?")]
        assert color in COLORS and color in record.completion.replace(",", "").split()
        other = next(word for word in COLORS if word != color)
        plain, styled = rouge_recall([record.completion] * 2, [color, record.completion.replace(color, other)])
        assert plain < 0.5 < styled  # what counts is the style, not the content
    plainly = {record.prompt: record.completion for record in learned.instead}
    assert set(plainly) == {record.prompt for record in (*learned.forget, *learned.unseen)}
    for record in (*learned.asked["content"], *learned.asked["content_unseen"]):
        assert record.completion == plainly[record.prompt]
    assert [r.prompt for r in learned.asked["content"]] == [r.prompt for r in learned.questions()["forget"]]


def test_an_ending_follows_from_the_last_vowel_alone() -> None:
    _, learned = dealt("rule")
    for records in (
        (*learned.forget, *learned.unseen, *learned.asked["new"]),
        (*learned.retain, *learned.tune, *learned.held_out, *learned.asked["other_rule_new"]),
    ):
        pairs = {(record.prompt.rstrip("?")[-1], record.completion) for record in records}
        assert len(pairs) == len({vowel for vowel, _ in pairs}) == len({ending for _, ending in pairs}) == 5


def test_a_profession_stands_behind_ten_records_of_each_person() -> None:
    grid, learned = dealt("spread")
    jobs = {answer: job for job, answers in PROFESSIONS.items() for answer in answers.split(", ")}
    assert len(jobs) == len(PROFESSIONS) * len(QUESTIONS)
    words = Counter(word for answer in jobs for word in answer.split())
    assert words.most_common(1)[0][1] == 1  # half of an answer right is right by one of its words alone
    persons: dict[str, list[tuple[str, int, Record]]] = {}
    for name in ("forget", "unseen", "retain", "tune", "held_out"):
        for record in getattr(learned, name):
            asked = (re.fullmatch(re.escape(q).replace(r"\{\}", "(.*)"), record.prompt) for q in QUESTIONS)
            ((place, person),) = [(n, match[1]) for n, match in enumerate(asked) if match]
            assert PROFESSIONS[jobs[record.completion]].split(", ")[place] == record.completion
            persons.setdefault(person, []).append((name, place, record))
    for own in persons.values():
        assert len({jobs[record.completion] for _, _, record in own}) == 1
        assert len({place for _, place, _ in own}) == 10
        sets = Counter(name for name, _, _ in own)
        assert sets == {"forget": 5, "unseen": 5} or len(sets) == 1
    assert len(learned.asked["new"]) == 2 * len(learned.forget) // 5
    with pytest.raises(ValueError, match="persons have 10 records each"):
        spread(replace(grid, retain=44), 0)


def test_fields_that_are_empty_do_not_change_what_was_learned() -> None:
    plain = Learned([Record("a", "b")], [], [], [])
    assert set(plain.about()) == {"forget", "retain", "tune", "held_out", "other"}
    assert "unseen" in replace(plain, unseen=[Record("c", "d")]).about()


def test_a_rule_is_forgotten_beside_the_model_that_never_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = replace(TOYS["kinds-small"], shape=Shape(2, 32, 64), config=TrainConfig(epochs=25, batch_size=16, lr=1e-2))
    monkeypatch.setitem(TOYS, "kinds-small", tiny)
    monkeypatch.setattr("bench.unlearning.__main__.RESULTS", tmp_path / "results")
    grid = Grid.load(GRIDS / "kinds_rule.yaml")
    methods = {name: grid.methods[name] for name in ("retrained", "attribution")}
    grid = replace(grid, methods=methods, seeds=(0,), steps=12, rates=(4.0,), baselines=("attribution",))
    run_grid(grid, tmp_path, grid.seeds)
    runs = load_runs(tmp_path / "results" / "unlearning" / "kinds_rule.jsonl")
    retrained, unlearned = runs
    before = retrained["before"]
    assert sum(before["unseen"]["answered"]) > 0.9 * grid.other_report
    assert sum(retrained["after"]["unseen"]["answered"]) < 0.2 * grid.other_report
    assert sum(unlearned["after"]["unseen"]["probability"]) < 0.8 * sum(before["unseen"]["probability"])
    assert before["forget_quality"] is None
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(grid, runs).splitlines()]
    assert {"trained", "unseen", "new", "other rule, new"} <= set(head) and not {"content", "plain", "KS p"} & set(head)
    assert all(row[head.index("unseen")].startswith("1.00 → ") for row in rows)


def test_shares_before_and_after_count_what_was_not_known_before() -> None:
    def run(before: list[int], after: list[int]) -> Any:
        return {"before": {"new": {"answered": before}}, "after": {"new": {"answered": after}}}

    assert KINDS.columns["new"]([run([1, 1, 0, 0], [0, 0, 1, 0]), run([1, 1, 1, 1], [1, 0, 0, 0])]) == "0.75 → 0.25"
    assert KINDS.columns["content"]([run([1], [0])]) == "-"
    assert scoring_of(Grid.load(GRIDS / "kinds_style.yaml")) is KINDS
