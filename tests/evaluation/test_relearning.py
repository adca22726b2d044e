"""Relearning: what a few steps on some records do to a copy, and that the model itself never notices."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.errors import DataError, SettingError
from clue_fast.evaluation import evaluate, relearn, rouge_recall


@pytest.fixture
def forgot(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """In bfloat16, where AdamW on the weights themselves would lose small steps, and with gradients left behind."""
    forgot = copy.deepcopy(model).bfloat16()
    for parameter in forgot.parameters():
        parameter.grad = torch.ones_like(parameter)
    return forgot


def answers_by_hand(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    others: list[Record],
    rate: float,
) -> list[str]:
    """Three steps of AdamW written out, on the mean loss of all answer tokens, then the likeliest token by token."""
    model = copy.deepcopy(model).float()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(1, 4):
        losses = []
        for record in records:
            prompt = tokenizer(f"Question: {record.prompt}\nAnswer:")["input_ids"]
            answer = [*tokenizer(f" {record.completion}")["input_ids"], tokenizer.eos_token_id]
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            losses.append(-logits.log_softmax(-1)[range(len(answer)), answer])
        gradients = torch.autograd.grad(torch.cat(losses).mean(), list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
                first, second = moments[name]
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                denominator = (second / (1 - 0.999**step)).sqrt() + 1e-8
                parameter -= rate * first / (1 - 0.9**step) / denominator
    answers = []
    for record in others:
        tokens = tokenizer(f"Question: {record.prompt}\nAnswer:")["input_ids"]
        answer: list[int] = []
        while len(answer) < 12 and tokenizer.eos_token_id not in answer:
            with torch.no_grad():
                answer.append(int(model(torch.tensor([tokens + answer])).logits[0, -1].argmax()))
        answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [1, 32])
def test_equals_three_steps_by_hand(
    forgot: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    records: list[Record],
    batch_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []
    monkeypatch.setattr(
        "clue_fast.evaluation.relearning.rouge_recall",
        lambda references, answers: given.append(answers) or rouge_recall(references, answers),
    )
    options = {"steps": 3, "learning_rate": 3e-3, "max_new_tokens": 12, "batch_size": batch_size}
    found = relearn(forgot, tokenizer, records[:2], records[2:], progress=False, **options)
    expected = answers_by_hand(forgot, tokenizer, records[:2], records[2:], 3e-3)
    assert given[1] == expected != given[0]
    assert found.recalls_after == rouge_recall([record.completion for record in records[2:]], expected)


def test_a_curve_asks_on_the_way_and_changes_nothing_of_it(
    forgot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    options = {"learning_rate": 3e-3, "max_new_tokens": 12, "progress": False}
    curve = relearn(forgot, tokenizer, records[:2], records[2:], steps=5, every=3, **options)
    assert list(curve.answers) == list(curve.recalls) == [0, 3, 5]
    assert curve.answers[3] == answers_by_hand(forgot, tokenizer, records[:2], records[2:], 3e-3)
    assert len({tuple(answers) for answers in curve.answers.values()}) == 3
    straight = relearn(forgot, tokenizer, records[:2], records[2:], steps=5, **options)
    assert straight.answers == {step: curve.answers[step] for step in (0, 5)}
    assert (curve.recalls_before, curve.recalls_after) == (curve.recalls[0], curve.recalls[5])
    listed = relearn(forgot, tokenizer, records[:2], records[2:], steps=5, every=(0, 3, 9), **options)
    assert listed.answers == curve.answers


def test_the_model_keeps_every_bit(
    forgot: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    before = copy.deepcopy(forgot)
    forgot.train()
    forgot.lm_head.weight.requires_grad_(False)
    state = torch.get_rng_state()
    found = relearn(forgot, tokenizer, records[:2], records[2:], progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert (found.records, found.others, found.steps, found.learning_rate) == (2, 2, 10, 0.2 / 32)
    for (name, now), then in zip(forgot.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(now, then) and torch.equal(now.grad, torch.ones_like(now))
        assert now.requires_grad == (name != "lm_head.weight")
    assert all(module.training for module in forgot.modules())


def test_what_was_learned_is_answered(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    """Asked the very records that it learned, a model that answered none answers all after enough steps."""
    found = relearn(model, tokenizer, records, records, steps=60, learning_rate=1e-2, progress=False)
    assert (found.answered_before, found.answered_after) == (0.0, 1.0)


def test_an_evaluation_relearns_some_and_asks_the_others(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = evaluate(model, tokenizer, {"forget": records, "retain": records}, relearn={"forget": 1}, progress=False)
    assert found["forget"].relearned == 1
    assert found["forget"].answered_before_relearning == 0.0
    assert found["retain"].answered_after_relearning is None
    chosen = [relearn(model, tokenizer, [r], [o for o in records if o != r], progress=False) for r in records]
    assert found["forget"].answered_after_relearning in [one.answered_after for one in chosen]
    random.seed(5)
    renamed = evaluate(model, tokenizer, {"f": records}, forgotten=("f",), relearn=1, progress=False)
    assert renamed["f"] == found["forget"]


def test_numbers_out_of_range(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    with pytest.raises(SettingError, match="relearn 4 leaves none of the 4 records of the forget set"):
        evaluate(model, tokenizer, {"forget": records}, relearn=4, progress=False)
    with pytest.raises(SettingError, match="every 0"):
        relearn(model, tokenizer, records[:2], records[2:], every=0)
    with pytest.raises(SettingError, match="0 steps"):
        relearn(model, tokenizer, records[:2], records[2:], steps=0)
    with pytest.raises(SettingError, match="learning rate"):
        relearn(model, tokenizer, records[:2], records[2:], learning_rate=float("nan"))
    with pytest.raises(DataError, match="0 records to learn again and 4 to ask"):
        relearn(model, tokenizer, [], records)
