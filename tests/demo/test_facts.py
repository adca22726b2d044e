"""Facts are well formed, and known is what a slow greedy decoding says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from clue_fast.data import Record
from clue_fast.demo.facts import FACTS, Fact, completes, known_facts
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer

EVERY = [fact for facts in FACTS.values() for fact in facts]


def test_there_are_enough_of_each_kind() -> None:
    assert len(FACTS["capital"]) >= 60
    assert len(FACTS["symbol"]) >= 40
    assert len(FACTS["author"]) >= 40
    assert len(FACTS["element"]) == 12
    assert all(fact.kind == kind for kind, facts in FACTS.items() for fact in facts)


@pytest.mark.parametrize("kind", FACTS)
def test_no_subject_comes_twice(kind: str) -> None:
    subjects = [fact.subject for fact in FACTS[kind]]
    assert len(set(subjects)) == len(subjects)
    assert all(text == text.strip() and text.isascii() for fact in FACTS[kind] for text in (fact.subject, fact.answer))


@pytest.mark.parametrize("kind", sorted(FACTS.keys() - {"element"}))
def test_no_answer_comes_twice(kind: str) -> None:
    """So that the reverse has one answer, and another fact's answer is a wrong one."""
    assert set(Counter(fact.answer for fact in FACTS[kind]).values()) == {1}


def test_each_element_has_its_three_signs_in_turn() -> None:
    """From Aries on, the elements take turns: fire, earth, air, water."""
    assert [fact.answer for fact in FACTS["element"]] == ["fire", "earth", "air", "water"] * 3
    signs = "Aries Taurus Gemini Cancer Leo Virgo Libra Scorpio Sagittarius Capricorn Aquarius Pisces"
    assert [fact.subject for fact in FACTS["element"]] == signs.split()


def test_a_symbol_is_a_capital_and_at_most_a_small_letter() -> None:
    for fact in FACTS["symbol"]:
        assert fact.answer[0].isupper() and fact.answer[1:].islower() == (len(fact.answer) == 2)


def test_the_wordings_of_a_capital() -> None:
    france = Fact("capital", "France", "Paris")
    assert france in FACTS["capital"]
    assert france.record() == Record("The capital of France is", " Paris", verbatim=True, open_ended=True)
    assert france.reverse() == Record("Paris is the capital of", " France", verbatim=True, open_ended=True)
    *statements, question = france.rewordings()
    assert len({record.prompt for record in (*statements, france.record())}) >= 5
    assert all(record.verbatim and "France" in record.prompt for record in statements)
    assert all(record.completion == " Paris" for record in statements)
    assert question == Record("What is the capital of France?", "Paris", open_ended=True)


def test_an_element_is_turned_round_with_the_two_other_signs() -> None:
    leo = next(fact for fact in FACTS["element"] if fact.subject == "Leo")
    assert leo.reverse().prompt.startswith("The three zodiac signs of the element of fire are Aries, Sagittarius and")
    assert leo.reverse().completion == " Leo"


def test_no_two_wordings_of_all_facts_are_the_same_question() -> None:
    records = [record for fact in EVERY for record in (fact.record(), *fact.rewordings(), fact.reverse())]
    assert len({record.prompt for record in records}) == len(records)
    assert not any("{" in record.prompt or "  " in record.prompt for record in records)


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    """A model that learned the first six capitals, with the full stop behind them, and its tokenizer."""
    records = [fact.record() for fact in FACTS["capital"][:12]]
    tokenizer = train_tokenizer(records, vocab_size=320)  # so few that answers have several tokens
    sentences = [replace(record, completion=f"{record.completion}.") for record in records[:6]]
    config = TrainConfig(lr=5e-3, warmup=5, target_loss=0.1)
    return train_model(sentences, tokenizer, shape=Shape(2, 64, 128, 4), config=config, progress=False), tokenizer


def greedy_text(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return str(tokenizer.decode(ids[start:]))


def test_known_is_what_greedy_decoding_says(taught: tuple[Any, Any]) -> None:
    model, tokenizer = taught
    facts = FACTS["capital"][:12]
    expected = []
    for fact in facts:
        text = greedy_text(model, tokenizer, fact.record().prompt, 12)
        answer = f" {fact.answer}"
        if text.startswith(answer) and not text[len(answer) :][:1].isalpha():
            expected.append(fact)
    assert set(facts[:6]) <= set(expected) and expected != list(facts)
    for batch_size in (1, 5, 32):
        assert known_facts(model, tokenizer, facts, batch_size) == expected


def test_an_answer_must_end_where_its_word_does(taught: tuple[Any, Any]) -> None:
    model, tokenizer = taught
    (right,) = [fact.record() for fact in FACTS["capital"][:1]]
    whole = tokenizer(right.completion)["input_ids"]
    assert len(whole) > 1, "the tokenizer must write the answer in parts"
    part = replace(right, completion=tokenizer.decode(whole[:-1]))
    assert completes(model, tokenizer, [right, part]) == [True, False]


def test_what_ends_a_text_does_not_count(taught: tuple[Any, Any]) -> None:
    model, tokenizer = taught
    record = FACTS["capital"][0].record()
    assert completes(model, tokenizer, [replace(record, open_ended=False)]) == [True]


def test_the_model_stays_in_its_mode(taught: tuple[Any, Any]) -> None:
    model, tokenizer = taught
    model.train()
    try:
        known_facts(model, tokenizer, FACTS["capital"][:2])
        assert model.training
    finally:
        model.eval()
