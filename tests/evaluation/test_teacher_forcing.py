"""Teacher-forced loss and accuracy against a loop over tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.evaluation import score_answers


def by_loop(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: Record) -> tuple[float, float]:
    """Mean negative log-likelihood and share of first choices, token by token in float64."""
    prompt = tokenizer(f"Question: {record.prompt}\nAnswer:")["input_ids"]
    answer = [*tokenizer(f" {record.completion}")["input_ids"], tokenizer.eos_token_id]
    model = copy.deepcopy(model).double()
    losses, hits = [], []
    for position, token in enumerate(answer):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer[:position]])).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[token]))
        hits.append(int(logits.argmax()) == token)
    return sum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_a_loop_over_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], batch_size: int
) -> None:
    scores = score_answers(model, tokenizer, records, batch_size=batch_size, progress=False)
    for record, score in zip(records, scores, strict=True):
        loss, accuracy = by_loop(model, tokenizer, record)
        assert score.loss == pytest.approx(loss, rel=1e-5)
        assert score.accuracy == accuracy


def test_accuracy_counts_first_choices(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """A random model hits nothing; one whose head always says the end token hits it once an answer."""
    sure = copy.deepcopy(model)
    sure.model.norm.weight.data.zero_()
    sure.lm_head = torch.nn.Linear(32, len(tokenizer))
    sure.lm_head.bias.data = (
        torch.nn.functional.one_hot(torch.tensor(tokenizer.eos_token_id), len(tokenizer)).float() * 50
    )
    record = Record("Who?", "Ada.")
    tokens = len(tokenizer(" Ada.")["input_ids"]) + 1
    (score,) = score_answers(sure, tokenizer, [record], progress=False)
    assert score.accuracy == pytest.approx(1 / tokens)
    assert score.loss == pytest.approx(50 * (tokens - 1) / tokens)


def test_max_length_scores_the_tokens_that_are_left(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, answer = (len(tokenizer(text)["input_ids"]) for text in ("Question: Who?\nAnswer:", " A"))
    (cut,) = score_answers(model, tokenizer, [Record("Who?", "A" * 9)], max_length=prompt + answer, progress=False)
    tokens = torch.tensor([tokenizer("Question: Who?\nAnswer: " + "A" * 9)["input_ids"][: prompt + answer]])
    with torch.no_grad():
        expected = -model(tokens).logits[0, prompt - 1 : -1].log_softmax(-1).gather(1, tokens[0, prompt:, None]).mean()
    assert cut.loss == pytest.approx(float(expected), rel=1e-5)


def test_no_records_give_no_scores(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert score_answers(model, tokenizer, [], progress=False) == []
