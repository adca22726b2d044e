"""Grids of ways to unlearn: what is run, what is kept after a kill, and how a rate is chosen."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.unlearning.__main__ import append, load_runs, run_grid
from bench.unlearning.grid import Grid, Method, Run
from bench.unlearning.measure import answers
from bench.unlearning.methods import select_units, unlearn, zero
from bench.unlearning.positions import at_subjects
from bench.unlearning.scores import FACTS as FACT_SCORING
from bench.unlearning.splits import load_known, load_never_known, split
from bench.unlearning.subjects import FactSubject
from bench.unlearning.tables import choose, differences, holm, interval, pareto_front, table
from clue_fast.data import Record
from clue_fast.demo.facts import FACTS
from clue_fast.evaluation import relearn
from clue_fast.evaluation.relearning import Relearning
from clue_fast.selection import Selection
from clue_fast.sparse import changed_inside, changed_outside, owned_weights, snapshot
from clue_fast.trainer import train_selected

GRID = """
model: tiny
kind: capital
seeds: [0, 1]
steps: 2
forget: 3
budgets: [0.1]
rates: [1, 2]
relearn_steps: 2
relearn_rate: 1.0e-3
methods:
  random: {criterion: random}
  pruned: {train: nothing, criterion: forget_attribution}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    (tmp_path / "tiny.yaml").write_text(GRID)
    return Grid.load(tmp_path / "tiny.yaml")


def test_the_sets_of_a_split_share_no_fact(grid: Grid) -> None:
    for seed in range(20):
        one = split(FACTS, grid, seed)
        facts = [*one.forget, *one.retain, *one.tune, *one.held_out, *one.other]
        assert len(set(facts)) == len(facts)
        assert {fact.kind for fact in (*one.forget, *one.held_out)} == {"capital"}
        assert "capital" not in {fact.kind for fact in one.other}
        training = {record.key for records in one.training().values() for record in records}
        reported = {record.key for name in ("reworded", "held_out", "other") for record in one.questions()[name]}
        assert not training & reported


def test_what_a_model_knows_is_found_out_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.unlearning.splits.known_facts", lambda model, tokenizer, facts: list(facts)[::2])
    known = load_known(model, tokenizer, "tiny", tmp_path)
    assert known == {kind: list(facts)[::2] for kind, facts in FACTS.items()}
    monkeypatch.setattr("bench.unlearning.splits.known_facts", lambda model, tokenizer, facts: [])
    assert load_known(model, tokenizer, "tiny", tmp_path) == known
    (tmp_path / "tiny.json").write_text('{"capital": ["Atlantis"]}')
    with pytest.raises(ValueError, match="Atlantis is no capital of the list any more"):
        load_known(model, tokenizer, "tiny", tmp_path)


def test_other_facts_are_another_run(grid: Grid) -> None:
    fewer = {kind: list(facts)[1:] for kind, facts in FACTS.items()}
    hashes = {split(known, grid, seed).hash for known in (FACTS, fewer) for seed in (0, 1)}
    assert len(hashes) == 4
    assert split(FACTS, grid, 0).hash == split(FACTS, grid, 0).hash


def test_a_setting_at_its_default_does_not_change_a_key(grid: Grid) -> None:
    plain, draws = Run("one", Method(), 0.1, 1, 0).key(grid), Run("one", Method(draws=3), 0.1, 1, 0, draw=2).key(grid)
    assert draws == {**plain, "draw": 2}
    assert Run("one", Method(noise=0.0, layers=(0.0, 1.0)), 0.1, 1, 0).key(grid) == plain
    assert Run("one", Method(noise=0.1), 0.1, 1, 0).key(grid) == {**plain, "noise": 0.1}


def test_each_budget_has_its_own_rates(tmp_path: Path) -> None:
    text = GRID.replace("rates: [1, 2]", "rates: {0.1: [1, 2], 0.2: [3]}")
    (tmp_path / "own.yaml").write_text(text.replace("budgets: [0.1]", "budgets: [0.1, 0.2]"))
    runs = [run for run in Grid.load(tmp_path / "own.yaml").runs() if run.seed == 0 and run.name == "random"]
    assert [(run.budget, run.rate) for run in runs] == [(0.1, 1), (0.1, 2), (0.2, 3)]
    (tmp_path / "own.yaml").write_text(text.replace("budgets: [0.1]", "budgets: [0.3]"))
    with pytest.raises(ValueError, match=r"rates has none for the budget 0\.3"):
        Grid.load(tmp_path / "own.yaml")


def test_a_model_that_knows_too_little_is_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="knows 5 facts of the kind capital; 16 are needed"):
        split({"capital": FACTS["capital"][:5]}, grid, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("budget: [1]", "budget is no setting of a grid"),
        ("relearn_rate: 1e-5", "relearn_rate '1e-5' is no number"),
        ("baselines: [nobody]", "the baseline 'nobody' is no method"),
    ],
)
def test_a_setting_that_is_unknown_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(f"{GRID}{line}\n")
    with pytest.raises(ValueError, match=message):
        Grid.load(tmp_path / "bad.yaml")
    with pytest.raises(ValueError, match="none of: units, all, lora, nothing"):
        Method(train="some")


def test_the_probability_of_an_answer_is_that_of_its_tokens_one_after_another(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records = [fact.record() for fact in random.Random(0).sample(FACTS["capital"], 7)]
    for record, (probability, said) in zip(records, answers(model, tokenizer, records), strict=True):
        ids = tokenizer(record.prompt)["input_ids"]
        whole = tokenizer(record.prompt + record.completion)["input_ids"]
        assert whole[: len(ids)] == ids
        expected, first_choices = 1.0, True
        for token in whole[len(ids) :]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].double()
            expected *= logits.softmax(-1)[token].item()
            first_choices &= int(logits.argmax()) == token
            ids = [*ids, token]
        assert probability == pytest.approx(expected, rel=1e-4)
        assert said == first_choices


def test_pruned_units_write_nothing(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid) -> None:
    training = split(FACTS, grid, 0).training()
    run = Run("pruned", Method(train="nothing", criterion="difference"), 0.1, 0.0, 0)
    selection = select_units(model, tokenizer, training, run)
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert zero(model, selection) == 2 * 4 * 32
    for name, value in model.named_parameters():
        if "down_proj" not in name:
            assert torch.equal(value, before[name])
    for site in selection.sites:
        weight, units = model.get_parameter(f"{site.output}.weight"), selection.units(site)
        rest = torch.ones(40, dtype=torch.bool)
        rest[units] = False
        assert len(units) == 4 and not weight[:, units].any()
        assert torch.equal(weight[:, rest], before[f"{site.output}.weight"][:, rest])


def test_units_of_some_layers_only(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid) -> None:
    run = Run("late", Method(criterion="random", layers=(0.5, 1.0)), 0.1, 1.0, 0)
    selection = select_units(model, tokenizer, split(FACTS, grid, 0).training(), run)
    assert [len(selection.units(site)) for site in selection.sites] == [0, 8]


def test_units_are_measured_at_the_last_token_of_the_subject(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid
) -> None:
    """Scores of every unit, against a loop over records in which the place is found by decoding."""
    training = split(FACTS, grid, 0).training()
    run = Run("one", Method(criterion="forget_attribution", positions="subject"), 0.1, 1.0, 0)
    selection = select_units(model, tokenizer, training, run)
    sums = {site.path: torch.zeros(site.width, dtype=torch.float64) for site in selection.sites}
    for record in training["forget"]:
        subjects = [fact.subject for facts in FACTS.values() for fact in facts if fact.subject in record.prompt]
        end = record.prompt.index(max(subjects, key=len)) + len(max(subjects, key=len))
        ids = tokenizer(record.prompt + record.completion)["input_ids"]
        place = next(n for n in range(len(ids)) if len(tokenizer.decode(ids[: n + 1])) >= end)
        answer = len(ids) - len(tokenizer(record.completion)["input_ids"])
        assert record.completion == tokenizer.decode(ids[answer:])
        kept: dict[str, torch.Tensor] = {}

        def keep(path: str, kept: dict[str, torch.Tensor] = kept) -> Any:
            return lambda _, args: (args[0].retain_grad(), kept.__setitem__(path, args[0]))[1]

        hooks = [
            model.get_submodule(site.output).register_forward_pre_hook(keep(site.path)) for site in selection.sites
        ]
        p = model(torch.tensor([ids])).logits[0].double().softmax(-1)
        chosen = torch.stack([p[n - 1, ids[n]] for n in range(answer, len(ids))])
        (chosen.log() - (1 - chosen).log()).sum().backward()
        for path, activation in kept.items():
            assert activation.grad is not None
            sums[path] += (activation * activation.grad)[0, place].detach().double().abs()
        for hook in hooks:
            hook.remove()
    for number, site in enumerate(selection.sites):
        expected = sums[site.path] / len(training["forget"])
        assert bool(expected.any()) == (number == 0)  # behind the last layer no token reads another
        torch.testing.assert_close(selection.scores[site].double(), expected, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="fisher measures whole records"):
        select_units(model, tokenizer, training, replace(run, method=replace(run.method, criterion="fisher")))
    with pytest.raises(ValueError, match="asks for no fact"):
        at_subjects([Record("Who is it?", " Me", verbatim=True, open_ended=True)], tokenizer)


@pytest.mark.parametrize(
    "settings",
    [
        {"train": "units"},
        {"train": "all"},
        {"train": "lora"},
        {"rounds": 3},
        {"reset": "reads"},
        {"sharpness": 0.1},
        {"relearn_inside": 2},
    ],
    ids=str,
)
def test_every_way_to_train_makes_the_answers_less_likely(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid, settings: dict[str, Any]
) -> None:
    parts = split(FACTS, grid, 0)
    asked = parts.training()["forget"]
    before = sum(math.log(p) for p, _ in answers(model, tokenizer, asked))
    method = Method(criterion="forget_attribution", objective="npo", **settings)
    trained = unlearn(model, tokenizer, parts.training(), Run("one", method, 0.5, 0.3, 0), replace(grid, steps=8))
    assert trained > 0
    assert sum(math.log(p) for p, _ in answers(model, tokenizer, asked)) < before - 0.1


def test_rounds_share_the_steps_and_each_selects_anew(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    selections: list[Selection] = []

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        sparse, history = train_selected(model, *args, **kwargs)
        steps.append(len(history))
        selections.append(sparse.selection)
        assert owned_weights(model, sparse.selection) == sum(values.numel() for values in sparse.trainable_parameters)
        return sparse, history

    monkeypatch.setattr("bench.unlearning.methods.train_selected", watched)
    parts = split(FACTS, grid, 0)
    before = snapshot(model)
    run = Run("rounds", Method(criterion="random", rounds=3), 0.25, 1.0, 0)
    trained = unlearn(model, tokenizer, parts.training(), run, replace(grid, steps=8))
    assert steps == [3, 3, 2]
    first, second, third = selections
    assert len({one.hash for one in selections}) == 3 and len(first) == len(second) == len(third) == 2 * 10
    union = first | second | third
    assert trained == len(union) * 3 * 32
    assert changed_outside(before, model, union) == 0
    assert changed_inside(before, model, union) > 0.9 * trained
    with pytest.raises(ValueError, match="2 steps are too few for 3 rounds"):
        unlearn(model, tokenizer, parts.training(), run, grid)


def test_a_grid_goes_on_after_a_kill(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    grid: Grid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    where = "bench.unlearning.subjects"
    monkeypatch.setattr("bench.unlearning.__main__.RESULTS", tmp_path)
    monkeypatch.setattr(f"{where}.load_pretrained", lambda name, folder: (model, tokenizer))
    monkeypatch.setattr(f"{where}.load_known", lambda model, tokenizer, name: FACTS)
    monkeypatch.setattr(f"{where}.load_never_known", lambda model, tokenizer, name, kind: list(FACTS["author"])[:2])
    monkeypatch.setattr("bench.unlearning.measure.text_loss", lambda model, tokenizer: 1.0)
    run_grid(grid, tmp_path, grid.seeds)
    path = tmp_path / "unlearning" / "tiny.jsonl"
    whole = load_runs(path)
    assert [(run["method"], run["key"]["rate"], run["key"]["seed"]) for run in whole] == [
        (name, rate, seed) for seed in (0, 1) for name, rate in (("random", 1), ("random", 2), ("pruned", 0.0))
    ]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][: len(lines[4]) // 2])  # killed while it wrote
    assert len(load_runs(path)) == 4
    run_grid(grid, tmp_path, grid.seeds)
    again = load_runs(path)
    assert [run["after"] for run in again] == [run["after"] for run in whole]
    assert path.read_bytes().startswith(b"".join(lines[:4]))
    assert [run["relearned"] for run in again] == [run["relearned"] for run in whole]
    head, _, *rows = (line.split("|") for line in table(grid, again).splitlines())
    for title in (" relearned ", " never known "):
        assert [len(row[head.index(title)].split()) for row in rows] == [3, 3]  # after 0, 1 and 2 steps
    for run in again:
        del run["relearned"]
    assert "relearned" not in table(grid, again)


def test_half_is_learned_again_and_the_others_and_unknown_facts_are_asked(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    told: list[Relearning] = []

    def watched(model: Any, tokenizer: Any, records: list[Record], others: list[Record], **settings: Any) -> Relearning:
        given.append((records, others, settings["steps"], settings["learning_rate"]))
        told.append(relearn(model, tokenizer, records, others, **settings))
        return told[-1]

    monkeypatch.setattr("bench.unlearning.subjects.relearn", watched)
    parts, unknown = split(FACTS, grid, 0), list(FACTS["author"])[:4]
    found = FactSubject((model, tokenizer), replace(parts, forget=FACTS["capital"][:6]), unknown).relearn(
        model, 12, 2e-3
    )
    assert given == [
        (
            [fact.record() for fact in FACTS["capital"][:6:2]],
            [fact.record() for fact in (*FACTS["capital"][1:6:2], *unknown)],
            12,
            2e-3,
        )
    ]
    assert found["asked"] == [fact.subject for fact in FACTS["capital"][1:6:2]]
    assert found["never_known"] == [fact.subject for fact in unknown]
    assert list(found["recalls"]) == list(found["recalls_never_known"]) == ["0", "1", "2", "5", "10", "12"]
    for step, recalls in told[0].recalls.items():
        both = found["recalls"][str(step)] + found["recalls_never_known"][str(step)]
        assert both == pytest.approx(recalls, abs=1e-4) and len(found["recalls"][str(step)]) == 3
        assert found["answered"][str(step)] == sum(recall >= 0.5 for recall in recalls[:3]) / 3


def test_never_known_is_what_no_wording_brings_out(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = list(FACTS["capital"])
    knows = {facts[0].record().key, facts[1].rewordings()[0].key, facts[2].rewordings()[-1].key}

    def completes(model: Any, tokenizer: Any, records: list[Record]) -> list[bool]:
        return [record.key in knows for record in records]

    def later(model: Any, tokenizer: Any, records: list[Record], **settings: Any) -> list[str]:
        return [f"the city of {facts[4].answer}" if record.key == facts[4].record().key else "" for record in records]

    monkeypatch.setattr("clue_fast.demo.real.completes", completes)
    monkeypatch.setattr("clue_fast.demo.real.greedy_answers", later)
    found = load_never_known(model, tokenizer, "tiny", "capital", tmp_path)
    assert found == [facts[3], *facts[5:]]
    knows.clear()
    assert load_never_known(model, tokenizer, "tiny", "capital", tmp_path) == found
    assert load_never_known(model, tokenizer, "tiny", "symbol", tmp_path) == list(FACTS["symbol"])
    assert load_never_known(model, tokenizer, "tiny", "capital", tmp_path) == found


def test_curves_are_shares_over_facts_and_runs() -> None:
    runs = [
        {"relearned": {"recalls": {"0": [0.0, 0.5], "10": one}, "recalls_never_known": {"0": [], "10": []}}}
        for one in ([1.0, 0.4], [1.0, 1.0])
    ]
    assert FACT_SCORING.columns["relearned"]([*runs, {}]) == "0.50 0.75"
    assert FACT_SCORING.columns["never known"](runs) == FACT_SCORING.columns["relearned"]([{}]) == "-"


def _run(method: str, rate: float, seed: int, *, tuned: tuple[float, float], reported: tuple[float, float]) -> Any:
    names = dict(zip(("forget", "tune", "reworded", "held_out"), (tuned[0], tuned[1], *reported), strict=True))
    return {
        "method": method,
        "key": {"budget": 0.1, "rate": rate, "seed": seed},
        "before": {name: {"probability": [0.8, 0.8], "answered": [1, 1]} for name in names},
        "after": {name: {"probability": [p, p], "answered": [1, 0]} for name, p in names.items()},
    }


def test_a_rate_is_chosen_by_the_tuning_part_and_the_rest_is_reported() -> None:
    better = {"tuned": (0.2, 0.8), "reported": (0.4, 0.6)}
    worse = {"tuned": (0.4, 0.8), "reported": (0.0, 0.8)}
    chosen = choose(
        [_run("one", rate, seed, **own) for rate, own in ((1, better), (2, worse)) for seed in (0, 1)], FACT_SCORING
    )
    one = chosen["one", 0.1]
    assert one.rate == 1
    assert one.values("forgotten") == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}
    assert one.values("kept") == {0: pytest.approx(0.75), 1: pytest.approx(0.75)}
    assert one.values("score") == {0: pytest.approx(0.6), 1: pytest.approx(0.6)}


def test_p_values_are_corrected_for_their_number() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_methods_are_compared_with_the_baseline_split_by_split() -> None:
    rows = {"random": (0.8, 0.7, 0.5), "better": (0.4, 0.3, 0.2), "same": (0.8, 0.7, 0.5)}
    runs = [
        _run(name, 1, seed, tuned=(0.2, 0.8), reported=(left * 0.8, 0.8))
        for name, lefts in rows.items()
        for seed, left in enumerate(lefts)
    ]
    found = differences(choose(runs, FACT_SCORING), "random")
    assert set(found) == {("better", 0.1), ("same", 0.1)}
    scores = {name: [2 * (1 - left) / (2 - left) for left in lefts] for name, lefts in rows.items()}
    gained = [mine - theirs for mine, theirs in zip(scores["better"], scores["random"], strict=True)]
    one = found["better", 0.1]
    assert one.middle == pytest.approx(sum(gained) / 3)
    spread = (sum((value - one.middle) ** 2 for value in gained) / 2) ** 0.5
    assert one.half == pytest.approx(4.302653 * spread / 3**0.5, rel=1e-5)
    assert one.p < 0.05
    assert one.corrected == one.p  # the other one has no p-value: all its differences are 0
    assert str(found["same", 0.1]) == "+0.000 ± 0.000"


def test_draws_of_a_seed_count_as_one() -> None:
    runs = [_run("one", 1, seed, tuned=(0.2, 0.8), reported=(gone, 0.8)) for seed in (0, 1) for gone in (0.0, 0.4, 0.8)]
    one = choose(runs, FACT_SCORING)["one", 0.1]
    assert one.values("forgotten") == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}
    assert len(one.every) == 6


def test_seeds_that_a_rate_lacks_do_not_count() -> None:
    some = {"tuned": (0.2, 0.8), "reported": (0.4, 0.6)}
    runs = [_run("one", rate, seed, **some) for rate, seed in ((1, 0), (1, 1), (2, 0))]
    assert list(choose(runs, FACT_SCORING)["one", 0.1].runs) == [0]


def test_answers_that_became_likelier_are_kept_and_not_forgotten() -> None:
    run = _run("one", 1, 0, tuned=(0.9, 0.9), reported=(0.9, 0.9))
    figures = FACT_SCORING.figures(run, ("reworded", "held_out"))
    assert (figures.forgotten, figures.kept, figures.score) == (0.0, 1.0, 0.0)


def test_the_front_is_of_points_that_no_other_beats_in_both() -> None:
    draw = random.Random(0)
    points = [(draw.randrange(8) / 8, draw.randrange(8) / 8) for _ in range(40)]
    for some in (points, points[:1], points[:3]):
        beaten = {p for p in some if any(q != p and q[0] >= p[0] and q[1] >= p[1] for q in some)}
        assert pareto_front(some) == sorted(set(some) - beaten)


def test_interval_covers_the_mean_in_95_of_100_cases() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(2000):
        middle, half = interval([draw.gauss(1.0, 2.0) for _ in range(5)])
        inside += abs(middle - 1.0) <= half
    assert inside / 2000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_append_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one.jsonl"
    append(path, {"number": 1})
    with path.open("a") as file:
        file.write('{"number":')
    append(path, {"number": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"number": 1}, {"number": 2}]


def test_every_grid_of_the_repository_can_be_read() -> None:
    grids = sorted((Path(__file__).parents[2] / "bench" / "unlearning" / "grids").glob("*.yaml"))
    assert grids
    for path in grids:
        grid = Grid.load(path)
        keys = [json.dumps(run.key(grid), sort_keys=True) for run in grid.runs()]
        assert len(set(keys)) == len(keys)
