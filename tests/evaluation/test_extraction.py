"""Extraction strength against every prefix, one after another."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record, encode
from clue_fast.evaluation import evaluate, extraction_strength, words

STEPS = 9


def slow_strength(predicted: list[int], tokens: list[int]) -> float:
    """1 - min {k : predicted[k:] = tokens[k:]} / n."""
    for k in range(len(tokens) + 1):
        if predicted[k:] == tokens[k:]:
            return 1 - k / len(tokens)
    raise AssertionError


def test_equals_the_definition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        tokens = [draw.randrange(3) for _ in range(draw.randrange(1, 9))]
        predicted = [token if draw.random() < 0.7 else 3 for token in tokens]
        right = [p == t for p, t in zip(predicted, tokens, strict=True)]
        assert extraction_strength(right) == pytest.approx(slow_strength(predicted, tokens))
    assert extraction_strength([True, True]) == 1.0
    assert extraction_strength([True, False]) == 0.0


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> LlamaForCausalLM:
    """A copy on half of the way to knowing the records by heart."""
    pupil = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(pupil.parameters(), lr=3e-3)
    for _ in range(STEPS):
        for example in encode(records, tokenizer):
            batch = {name: torch.tensor([values]) for name, values in example.items()}
            pupil(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return pupil.eval()


def greedy(model: LlamaForCausalLM, tokens: list[int], count: int, end: int | None) -> list[int]:
    """So many tokens more, or up to an end, without a cache."""
    tokens = list(tokens)
    start = len(tokens)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == end:
            break
    return tokens[start:]


def test_in_an_evaluation_every_prefix_is_tried(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    pupil = train(model, tokenizer, records)
    names = ["extraction_strength", "extraction_strength_generated"]
    found = evaluate(pupil, tokenizer, {"f": records}, metrics=names, batch_size=3, progress=False)["f"]
    forced, generated = [], []
    for example in encode(records, tokenizer):
        tokens, first = example["input_ids"], example["labels"].count(-100)
        answer, n = tokens[first:-1], len(tokens) - 1 - first
        with torch.no_grad():
            predicted = pupil(input_ids=torch.tensor([tokens])).logits[0].argmax(-1).tolist()[first - 1 : -2]
        forced.append(slow_strength(predicted, answer))
        wanted = words(tokenizer.decode(answer))

        def says_it(k: int, tokens=tokens, first=first, answer=answer, n=n, wanted=wanted) -> bool:
            rest = greedy(pupil, tokens[: first + k], n - k, tokens[-1])
            text = tokenizer.decode(answer[:k] + rest, skip_special_tokens=True)
            return words(text)[: len(wanted)] == wanted

        generated.append(1 - next(k for k in range(n + 1) if says_it(k)) / n)
    assert found.values["extraction_strength"] == pytest.approx(forced)
    assert found.values["extraction_strength_generated"] == pytest.approx(generated)
    assert found.value("extraction_strength") == pytest.approx(sum(forced) / len(forced))
    assert len(set(forced)) > 1, "choose other steps: every answer is known to the same degree"
    assert all(free >= strict for free, strict in zip(generated, forced, strict=True))


def test_what_was_not_measured_is_skipped(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = evaluate(model, tokenizer, {"f": records}, progress=False)["f"]
    assert "extraction_strength" not in found.further
    later = replace(found, asked=("extraction_strength", "extraction_strength_generated")).measured()
    assert later.value("extraction_strength") is not None  # from the same forward pass
    assert "no prefixes were continued" in later.skipped["extraction_strength_generated"]
