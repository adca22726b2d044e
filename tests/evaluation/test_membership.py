"""Membership inference against loops over pairs and tokens."""

from __future__ import annotations

import math
import random
import zlib

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record, encode
from clue_fast.errors import DataError
from clue_fast.evaluation import Metrics, area_under_curve, evaluate, min_k_score, privacy_leakage, zlib_score

UNSEEN = [
    Record("Who swept the quay?", "Ben did, on Sundays."),
    Record("What was sold there?", "Salt and rope."),
    Record("Is it long?", "It is, and wide."),
]


def pairs(members: list[float], others: list[float]) -> float:
    """The share of pairs that are in order, a tie for half of one."""
    won = sum((m > o) + 0.5 * (m == o) for m in members for o in others)
    return won / (len(members) * len(others))


def test_area_is_the_share_of_pairs_in_order() -> None:
    draw = random.Random(0)
    for count, others in ((1, 1), (7, 5), (40, 60)):
        first = [draw.randrange(12) / 4 for _ in range(count)]
        second = [draw.randrange(12) / 4 - 0.5 for _ in range(others)]
        assert area_under_curve(first, second) == pytest.approx(pairs(first, second), abs=1e-12)
    assert area_under_curve([2.0, 3.0], [0.0, 1.0]) == 1.0
    with pytest.raises(DataError, match="one of them has none"):
        area_under_curve([], [1.0])


def test_scores_by_hand() -> None:
    assert min_k_score([-1.0, -5.0, -3.0, -2.0, -4.0], 0.4) == -4.5
    assert min_k_score([-1.0, -5.0], 0.4) == -5.0  # one at least
    text = "the quay, the quay, the quay"
    assert zlib_score(2.0, text) == -2.0 / len(zlib.compress(text.encode()))
    # A model that gives every record away against a retrained one that gives none: A falls from .5 to 0.
    assert privacy_leakage(1.0, 0.5) == pytest.approx(-100.0)
    assert privacy_leakage(0.5, 0.5) == 0.0
    assert privacy_leakage(0.25, 0.5) == pytest.approx(50.0)


def token_scores(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record
) -> tuple[list[float], list[float]]:
    """Log-probabilities of the tokens of an answer without its end, and the same normalized, token by token."""
    (example,) = encode([record], tokenizer)
    tokens, first = example["input_ids"], example["labels"].count(-100)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].double()
    plain, normalized = [], []
    for place in range(first, len(tokens) - 1):
        every = [float(value) for value in torch.log_softmax(logits[place - 1], -1)]
        mean = sum(math.exp(value) * value for value in every)
        variance = sum(math.exp(value) * (value - mean) ** 2 for value in every)
        plain.append(every[tokens[place]])
        normalized.append((every[tokens[place]] - mean) / math.sqrt(variance))
    return plain, normalized


def lowest(values: list[float]) -> float:
    kept = sorted(values)[: max(1, int(0.4 * len(values)))]
    return sum(kept) / len(kept)


def test_attacks_are_those_of_the_definition(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    torch.manual_seed(1)
    retrained = LlamaForCausalLM(model.config).eval()
    sets = {"forget": records, "unseen": UNSEEN}
    options = {"metrics": "all", "batch_size": 3, "progress": False}
    known = evaluate(retrained, tokenizer, sets, **options)
    found = evaluate(model, tokenizer, sets, retrained=known, **options)

    def area(score) -> float:
        return pairs([score(one) for one in records], [score(one) for one in UNSEEN])

    def loss(of: LlamaForCausalLM, record: Record) -> float:
        (example,) = encode([record], tokenizer)
        batch = {name: torch.tensor([values]) for name, values in example.items()}
        with torch.no_grad():
            return float(of(**batch).loss)

    values = found["forget"].further
    min_k = area(lambda one: lowest(token_scores(model, tokenizer, one)[0]))
    expected = {
        "membership_loss": area(lambda one: -loss(model, one)),
        "membership_zlib": area(lambda one: -loss(model, one) / len(zlib.compress(one.completion.encode()))),
        "membership_min_k": min_k,
        "membership_min_k_plus_plus": area(lambda one: lowest(token_scores(model, tokenizer, one)[1])),
        "membership_reference": area(lambda one: loss(retrained, one) - loss(model, one)),
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    for record, score in zip(records, found["forget"].scores, strict=True):
        plain, normalized = token_scores(model, tokenizer, record)
        assert score.log_probs[: score.length] == pytest.approx(plain, abs=1e-4)
        assert score.normalized[: score.length] == pytest.approx(normalized, abs=1e-3)
    before = area(lambda one: lowest(token_scores(retrained, tokenizer, one)[0]))
    assert values["privacy_leakage"] == pytest.approx((before - min_k) / (1 - before) * 100)
    assert "membership_loss" not in found["unseen"].further
    # Of figures that were saved, the area is enough.
    saved = {name: Metrics.from_dict(own.as_dict()) for name, own in known.items()}
    again = evaluate(model, tokenizer, sets, retrained=saved, **options)
    assert again["forget"].further == pytest.approx(values)


def test_without_unseen_records_or_a_retrained_model_they_are_skipped(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    names = ["membership_loss", "privacy_leakage", "forget_quality"]
    found = evaluate(model, tokenizer, {"forget": records}, metrics=names, progress=False)["forget"]
    assert found.skipped == {
        "membership_loss": 'no set "unseen" of records that no model was trained on',
        "privacy_leakage": 'no set "unseen" of records that no model was trained on',
        "forget_quality": "no retrained model to compare with",
    }
    assert found.further == {}
    more = {"forget": records, "unseen": UNSEEN}
    found = evaluate(model, tokenizer, more, metrics=names, progress=False)["forget"]
    assert set(found.skipped) == {"privacy_leakage", "forget_quality"}
    assert found.value("membership_loss") is not None
