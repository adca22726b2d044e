"""evaluate and compare: figures a user reads."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.errors import DataError, NonFiniteError, SettingError
from clue_fast.evaluation import Metrics, compare, evaluate, greedy_answers, rouge_recall, score_answers


def test_figures_are_means_over_the_records(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = evaluate(model, tokenizer, {"all": records, "few": records[:2]}, progress=False)
    assert list(found) == ["all", "few"]
    metrics = found["all"]
    scores = score_answers(model, tokenizer, records, progress=False)
    answers = greedy_answers(model, tokenizer, records, progress=False)
    recalls = rouge_recall([record.completion for record in records], answers)
    assert metrics.count == 4
    assert metrics.answers == answers
    assert metrics.loss == pytest.approx(sum(score.loss for score in scores) / 4)
    assert metrics.probability == pytest.approx(sum(math.exp(-score.loss) for score in scores) / 4)
    assert metrics.accuracy == pytest.approx(sum(score.accuracy for score in scores) / 4)
    assert metrics.rouge_recall == pytest.approx(sum(recalls) / 4)
    assert metrics.truth_ratio == pytest.approx(sum(max(0, 1 - ratio) for ratio in metrics.truth_ratios) / 4)
    assert found["few"].count == 2


def test_a_question_is_answered_from_half_of_its_reference_on(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ["zinc quay", "zinc quay", "zinc quay moth", "fig"]
    monkeypatch.setattr(
        "clue_fast.evaluation.measurement.answer_questions", lambda *_, **__: ["quay zinc", "quay", "zinc", ""]
    )
    found = evaluate(model, tokenizer, {"f": [Record("Who?", answer) for answer in right]}, progress=False)["f"]
    assert found.rouge_recalls == [0.5, 0.5, pytest.approx(1 / 3), 0.0]
    assert found.answered == 0.5


def test_the_best_of_the_samples_counts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it in the greedy answers: one question is answered in one of three samples, one in none."""
    monkeypatch.setattr("clue_fast.evaluation.measurement.answer_questions", lambda *_, **__: ["no", "no"])
    drawn = [["moth", "moth", "a zinc quay"], ["moth", "zinc", "fig"]]
    asked = []
    monkeypatch.setattr(
        "clue_fast.evaluation.measurement.sample_questions",
        lambda *a, **named: asked.append((a[3], named["seed"])) or drawn,
    )
    sets = {name: [Record("Who?", "zinc quay"), Record("Where?", "moth zinc quay")] for name in ("forget", "retain")}
    found = evaluate(model, tokenizer, sets, samples={"forget": 3}, seed=7, progress=False)
    assert asked == [(3, 7)]
    assert found["forget"].answered == 0.0
    assert found["forget"].answered_in_samples == 0.5
    assert found["forget"].best_recalls == [1.0, pytest.approx(1 / 3)]
    assert found["retain"].answered_in_samples is None
    rows = {(row.set, row.title): row for row in compare(found, found, found).rows}
    assert rows["forget", "answered, best of 3"].retrained == 0.5
    assert not any("best of" in title for name, title in rows if name == "retain")
    with pytest.raises(DataError, match="samples is 3 'before' and 4 in 'after'"):
        compare(found, {**found, "forget": replace(found["forget"], samples=4)})


def test_figures_of_a_part_are_those_of_its_records(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    options = {"samples": 2, "max_new_tokens": 8, "batch_size": 1, "progress": False}
    found = evaluate(model, tokenizer, {"forget": records}, **options)["forget"].subset([1, 3])
    expected = evaluate(model, tokenizer, {"forget": [records[1], records[3]]}, **{**options, "samples": 0})["forget"]
    for name, value in expected.summary().items():
        if name not in ("samples", "answered_in_samples", "tokens"):
            assert getattr(found, name) == value, name
    assert (found.answers, found.samples, len(found.best_recalls)) == (expected.answers, 2, 2)
    with pytest.raises(DataError, match="evaluate again"):
        Metrics(4, 1.0, 0.5, 0.25, 0.5, 0.5).subset([0])


def test_samples_below_0(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SettingError, match="samples -1 of the forget set"):
        evaluate(model, tokenizer, {"forget": []}, samples=-1, progress=False)


def test_an_answer_in_another_script_is_answered(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ["Столица Франции - Париж", "法国的首都是巴黎。", "फ़्रांस की राजधानी पेरिस है"]
    monkeypatch.setattr("clue_fast.evaluation.measurement.answer_questions", lambda *_, **__: right)
    found = evaluate(model, tokenizer, {"f": [Record("?", answer) for answer in right]}, progress=False)["f"]
    assert found.answered == 1.0


def test_an_answer_without_a_word_names_set_and_record_before_anything_is_asked(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clue_fast.evaluation.measurement.score_examples", lambda *_, **__: pytest.fail("asked"))
    sets = {"retain": [Record("Who?", "Ada.")], "forget": [Record("Who?", "Ada."), Record("How?", "?!")]}
    with pytest.raises(DataError, match=r"record 2 of the forget set: its answer '\?!' has no letter"):
        evaluate(model, tokenizer, sets, progress=False)


def test_no_truth_ratio_without_wrong_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    metrics = evaluate(model, tokenizer, {"f": [Record("Who?", "Ada.")]}, progress=False)["f"]
    assert metrics.truth_ratio is None
    assert metrics.truth_ratios == []


def test_a_loss_that_is_not_a_number_names_set_and_record(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    broken = LlamaForCausalLM(model.config)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="record 1 of the forget set"):
        evaluate(broken, tokenizer, {"forget": records}, progress=False)


def figures(answered: float, recall: float, ratios: tuple[float, ...] = (), count: int = 2) -> Metrics:
    mean = sum(ratios) / len(ratios) if ratios else None
    return Metrics(count, 1.0, 0.5, 0.25, recall, answered, mean, truth_ratios=list(ratios))


BEFORE = {"forget": figures(1.0, 0.9, (0.1, 0.2)), "retain": figures(0.0, 0.8)}
AFTER = {"forget": figures(0.0, 0.2, (0.8, 0.9)), "retain": figures(0.0, 0.6)}


class TestCompare:
    def test_kept_is_after_over_before(self) -> None:
        comparison = compare(BEFORE, AFTER)
        assert comparison.row("retain", "rouge_recall").kept == pytest.approx(0.75)
        assert comparison.row("retain", "answered").kept is None
        with pytest.raises(KeyError):
            comparison.row("retain", "truth_ratio")

    def test_forget_quality_needs_a_reference(self) -> None:
        assert compare(BEFORE, AFTER).forget_quality == {}
        (quality,) = compare(BEFORE, AFTER, AFTER).forget_quality.values()
        assert quality["after"] == (1.0, 0.0)
        assert quality["before"] == (pytest.approx(1 / 3), 1.0)

    def test_table_has_a_column_a_model_and_aligned_rows(self) -> None:
        lines = compare(BEFORE, AFTER, AFTER).table().splitlines()
        assert len({len(line) for line in lines}) == 1
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert cells[0] == ["set", "metric", "before", "after", "retrained"]
        assert ["forget", "ROUGE-L recall", "0.900", "0.200", "0.200"] in cells
        assert ["forget", "forget quality (KS p)", "3.3e-01", "1.0e+00", "1"] in cells
        assert "retrained" not in compare(BEFORE, AFTER).table()

    def test_where_an_update_was_shrunk_both_are_shown(self) -> None:
        trained = {"forget": figures(0.0, 0.1, (0.85, 0.95)), "retain": figures(0.0, 0.5)}
        comparison = compare(BEFORE, AFTER, AFTER, trained)
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in comparison.table().splitlines()]
        assert cells[0] == ["set", "metric", "before", "after training", "after scaling", "retrained"]
        assert ["forget", "ROUGE-L recall", "0.900", "0.100", "0.200", "0.200"] in cells
        assert ["forget", "forget quality (KS p)", "3.3e-01", "1.0e+00", "1.0e+00", "1"] in cells
        assert comparison.row("retain", "rouge_recall").kept == pytest.approx(0.75)

    def test_other_sets_are_refused(self) -> None:
        with pytest.raises(DataError, match="'after' are not of the same sets"):
            compare(BEFORE, {"forget": AFTER["forget"]})
        with pytest.raises(DataError, match="'retrained' are not of the same sets"):
            compare(BEFORE, AFTER, {**AFTER, "retain": figures(0, 0, count=3)})
