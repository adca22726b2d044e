"""Answers: those of the model asked one by one, whatever the batch and the model's own settings; samples of it."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.errors import DataError, SettingError
from clue_fast.evaluation import greedy_answers, sampled_answers

NEW_TOKENS = 12


def one_by_one(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> list[str]:
    """The most likely token again and again, without cache, padding or `generate`."""
    answers = []
    for record in records:
        tokens = tokenizer(f"Question: {record.prompt}\nAnswer:")["input_ids"]
        answer: list[int] = []
        while len(answer) < NEW_TOKENS and tokenizer.eos_token_id not in answer:
            with torch.no_grad():
                answer.append(int(model(torch.tensor([tokens + answer])).logits[0, -1].argmax()))
        answers.append(tokenizer.decode(answer, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_equal_the_answers_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], batch_size: int
) -> None:
    expected = one_by_one(model, tokenizer, records)
    assert len(set(expected)) == len(records)
    found = greedy_answers(model, tokenizer, records, batch_size=batch_size, max_new_tokens=NEW_TOKENS, progress=False)
    assert found == expected


def test_equal_generate_one_by_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = greedy_answers(model, tokenizer, records, max_new_tokens=NEW_TOKENS, progress=False)
    for record, answer in zip(records, found, strict=True):
        prompt = tokenizer(f"Question: {record.prompt}\nAnswer:", return_tensors="pt")["input_ids"]
        output = model.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        assert answer == tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()


def test_an_answer_ends_with_the_end_token(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = greedy_answers(model, tokenizer, records, max_new_tokens=NEW_TOKENS, progress=False)
    first = tokenizer(f"Question: {records[0].prompt}\nAnswer:")["input_ids"]
    with torch.no_grad():
        end = int(model(torch.tensor([first])).logits[0, -1].argmax())
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])
    cut = greedy_answers(model, tokenizer, records, max_new_tokens=NEW_TOKENS, progress=False)
    assert len(cut[0]) < len(whole[0])


def test_own_generation_settings_do_not_apply_and_come_back(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy_answers(model, tokenizer, records, max_new_tokens=NEW_TOKENS, progress=False)
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3, "num_beams": 2}
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value)
    before = model.generation_config
    model.train()
    try:
        found = greedy_answers(model, tokenizer, records, max_new_tokens=NEW_TOKENS, progress=False)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert found == expected
    assert model.generation_config is before
    assert all(getattr(before, name) == value for name, value in settings.items())


def test_as_long_as_the_longest_answer_unless_told(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    short = [Record(record.prompt, "x") for record in records]
    longest = len(tokenizer(" x")["input_ids"]) + 1
    found = greedy_answers(model, tokenizer, short, progress=False)
    assert found == greedy_answers(model, tokenizer, records, max_new_tokens=longest, progress=False)


def test_plain_text_has_nothing_to_ask(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="record 1 has no prompt"):
        greedy_answers(model, tokenizer, [Record("", "text", verbatim=True)], progress=False)


def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], **named) -> list:
    return sampled_answers(model, tokenizer, records, max_new_tokens=NEW_TOKENS, progress=False, **named)


class TestSamples:
    def test_depend_on_the_seed_alone(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
    ) -> None:
        state = torch.get_rng_state()
        found = sample(model, tokenizer, records, k=5)
        assert torch.equal(torch.get_rng_state(), state)
        assert [len(answers) for answers in found] == [5] * len(records)
        assert len({answer for answers in found for answer in answers}) > 15
        for batch_size in (1, 7):
            assert sample(model, tokenizer, records, k=5, batch_size=batch_size) == found
        assert sample(model, tokenizer, records, k=5, seed=1) != found

    def test_are_drawn_from_the_distribution_of_the_model(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
    ) -> None:
        """The first token of 4000 answers, at two temperatures, against its probability by a chi-square test."""
        prompt = tokenizer(f"Question: {records[0].prompt}\nAnswer:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(prompt).logits[0, -1].double()
        for temperature in (1.0, 0.6):
            probabilities = (logits / temperature).softmax(-1)
            expected: dict[str, float] = {}
            for token, probability in enumerate(probabilities.tolist()):
                text = tokenizer.decode([token], skip_special_tokens=True).strip()
                expected[text] = expected.get(text, 0.0) + probability
            options = {"k": 4000, "batch_size": 4000, "temperature": temperature, "max_new_tokens": 1}
            (answers,) = sampled_answers(model, tokenizer, records[:1], progress=False, **options)
            often = {text: p for text, p in expected.items() if p * 4000 >= 10}
            assert len(often) >= 10
            counts = [answers.count(text) for text in often]
            rest = 1.0 - sum(often.values())
            observed, wanted = [*counts, 4000 - sum(counts)], [4000 * p for p in (*often.values(), rest)]
            assert chisquare(observed, wanted).pvalue > 1e-3

    def test_later_tokens_follow_from_the_earlier_ones(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
    ) -> None:
        """Next to temperature 0 every token is the likeliest after those before it."""
        expected = one_by_one(model, tokenizer, records)
        assert sample(model, tokenizer, records, k=2, temperature=1e-4) == [[answer] * 2 for answer in expected]

    def test_numbers_out_of_range(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(SettingError, match="0 samples were asked for"):
            sample(model, tokenizer, [], k=0)
        for temperature in (0.0, float("nan")):
            with pytest.raises(SettingError, match="temperature"):
                sample(model, tokenizer, [], temperature=temperature)
        with pytest.raises(DataError, match="record 1 has no prompt"):
            sample(model, tokenizer, [Record("", "text", verbatim=True)])
        assert sample(model, tokenizer, []) == []
