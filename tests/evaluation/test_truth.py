"""Truth ratio by hand, and forget quality as the TOFU authors' own logs give it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.errors import DataError
from clue_fast.evaluation import forget_quality, score_answers, truth_ratio, truth_ratios


def test_truth_ratio_by_hand() -> None:
    right, wrong = -math.log(0.5), [-math.log(0.1), -math.log(0.4)]
    assert truth_ratio(right, wrong) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.5)
    assert truth_ratio(right, wrong, "arithmetic") == pytest.approx(0.25 / 0.5)
    assert truth_ratio(right, [right]) == pytest.approx(1.0)


def test_truth_ratio_of_improbable_answers_neither_overflows_nor_vanishes() -> None:
    for mean in ("geometric", "arithmetic"):
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


def test_a_record_without_wrong_answers_is_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    with pytest.raises(DataError, match="record 2 has no perturbed answers"):
        truth_ratios(model, tokenizer, [records[0], Record("Why?", "So.")], progress=False)


def test_forget_quality_by_hand() -> None:
    """Two samples that do not overlap: D is 1, and p is 2 / C(8, 4), both orders of all orders."""
    assert forget_quality([1, 2, 3, 4], [5, 6, 7, 8]) == (pytest.approx(2 / math.comb(8, 4)), 1.0)
    assert forget_quality([1, 2, 3], [1, 2, 3]) == (1.0, 0.0)


def test_forget_quality_needs_both() -> None:
    for pair in (([], [1.0]), ([1.0], [])):
        with pytest.raises(DataError, match="one of them has none"):
            forget_quality(*pair)


@pytest.fixture
def logs(data_dir: Path) -> dict[str, dict[str, Any]]:
    folder = data_dir / "tofu_reference_logs"
    if not folder.is_dir():
        pytest.skip(f"no logs of the TOFU authors at {folder}")
    return {
        name: json.loads((folder / f"llama2-7b_{name}_wd0.01_eval_log_aggregated.json").read_text())
        for name in ("full", "retain90")
    }


def ratios_of(log: dict[str, Any]) -> list[float]:
    """Truth ratios on the forget set, from the losses in a log."""
    forget = log["eval_log_forget.json"]
    return [
        truth_ratio(loss, forget["average_perturb_loss"][key]) for key, loss in forget["avg_paraphrased_loss"].items()
    ]


def test_truth_ratios_are_those_of_the_tofu_authors(logs: dict[str, dict[str, Any]]) -> None:
    for log in logs.values():
        logged = list(log["eval_log_forget.json"]["truth_ratio"].values())
        assert ratios_of(log) == pytest.approx(logged, rel=1e-5)


def test_forget_quality_is_that_of_the_tofu_authors(logs: dict[str, dict[str, Any]]) -> None:
    p, statistic = forget_quality(ratios_of(logs["full"]), ratios_of(logs["retain90"]))
    assert p == pytest.approx(1.834066e-21, rel=1e-6)
    assert statistic == pytest.approx(0.396667, abs=5e-7)
