"""Truth ratio and forget quality by hand; the TOFU authors' own logs are in test_tofu_golden."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.errors import DataError
from clue_fast.evaluation import (
    compare,
    evaluate,
    forget_quality,
    mean_truth_ratio,
    score_answers,
    truth_ratio,
    truth_ratios,
)

MEANS = ("geometric", "arithmetic")


def test_truth_ratio_by_hand() -> None:
    right, wrong = -math.log(0.5), [-math.log(0.1), -math.log(0.4)]
    assert truth_ratio(right, wrong) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.5)
    assert truth_ratio(right, wrong, "arithmetic") == pytest.approx(0.25 / 0.5)
    assert truth_ratio(right, [right]) == pytest.approx(1.0)


def test_truth_ratio_of_improbable_answers_neither_overflows_nor_vanishes() -> None:
    for mean in MEANS:
        assert truth_ratio(900.0, [900.0, 900.0], mean) == pytest.approx(1.0)


def test_truth_ratios_compare_perturbed_answers_with_the_paraphrase(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = truth_ratios(model, tokenizer, records, batch_size=3, progress=False)
    for record, ratio in zip(records, found, strict=True):
        right = record.paraphrase if record.paraphrase is not None else record.completion
        answers = [replace(record, completion=answer) for answer in (right, *record.perturbed)]
        first, *rest = (score.loss for score in score_answers(model, tokenizer, answers, progress=False))
        likelihoods = [math.exp(-loss) for loss in rest]
        expected = math.prod(likelihoods) ** (1 / len(likelihoods)) / math.exp(-first)
        assert ratio == pytest.approx(expected, rel=1e-5)


def test_mean_truth_ratio_by_hand() -> None:
    ratios = [0.5, 4.0, 1.0]
    assert mean_truth_ratio(ratios, forgotten=True) == pytest.approx((0.5 + 0.25 + 1.0) / 3)
    assert mean_truth_ratio(ratios, forgotten=False) == pytest.approx(0.5 / 3)
    assert mean_truth_ratio([0.0, math.inf], forgotten=True) == 0.0
    with pytest.raises(DataError, match="at least one record"):
        mean_truth_ratio([], forgotten=True)


def test_a_record_without_wrong_answers_is_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    with pytest.raises(DataError, match="record 2 has no perturbed answers"):
        truth_ratios(model, tokenizer, [records[0], Record("Why?", "So.")], progress=False)


def test_an_evaluation_averages_by_what_is_to_become_of_the_set(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = evaluate(model, tokenizer, {"forget": records, "retain": records}, progress=False)
    ratios = {mean: truth_ratios(model, tokenizer, records, mean=mean, progress=False) for mean in MEANS}
    assert found["forget"].truth_ratios == pytest.approx(ratios["geometric"])
    assert found["forget"].truth_ratio == pytest.approx(mean_truth_ratio(ratios["geometric"], forgotten=True))
    assert found["retain"].truth_ratio == pytest.approx(mean_truth_ratio(ratios["arithmetic"], forgotten=False))
    titles = {(row.set, row.metric): row.title for row in compare(found, found).rows}
    assert titles["forget", "truth_ratio"] == "truth ratio, min(R, 1/R)"
    assert titles["retain", "truth_ratio"] == "truth ratio, max(0, 1-R)"
    other = evaluate(model, tokenizer, {"names": records}, forgotten=["names"], progress=False)["names"]
    assert other.truth_ratio == found["forget"].truth_ratio


def test_forget_quality_by_hand() -> None:
    """Two samples that do not overlap: D is 1, and p is 2 / C(8, 4), both orders of all orders."""
    assert forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == (pytest.approx(2 / math.comb(8, 4)), 1.0)
    assert forget_quality([1, 2, 3], [1, 2, 3]) == (1.0, 0.0)


def test_forget_quality_needs_both() -> None:
    for pair in (([], [1.0]), ([1.0], [])):
        with pytest.raises(DataError, match="one of them has none"):
            forget_quality(*pair)
