"""The sets of a training as examples: what is cut, padded, refused, and which answers stand in for forgotten ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clue_fast.errors import DataError
from clue_fast.objectives import REFUSALS
from clue_fast.trainer.pairing import encode_refusals, encode_set


class Characters:
    """A tokenizer of characters."""

    eos_token_id, bos_token_id, chat_template = 1, None, None

    def __call__(self, texts, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}

    def read(self, example: dict[str, list[int]]) -> tuple[str, str]:
        """(prompt, answer) of an example."""
        pairs = list(zip(example["input_ids"], example["labels"], strict=True))
        assert pairs[-1] == (1, 1) and all(label in (-100, token) for token, label in pairs)
        prompt, answer = (
            "".join(chr(token) for token, label in pairs[:-1] if (label == -100) == asked) for asked in (True, False)
        )
        return prompt, answer


FORGET = [{"question": f"Who is {name}?", "answer": "A poet."} for name in "ABCDEFGHIJ"]


def test_refusals_answer_the_same_questions():
    tokenizer = Characters()
    asked = encode_set(FORGET, "forget", tokenizer, None)
    refused = encode_refusals(FORGET, tokenizer, None, seed=0)
    answers = []
    for one, other in zip(asked, refused, strict=True):
        assert tokenizer.read(one)[0] == tokenizer.read(other)[0]
        assert tokenizer.read(one)[1] == " A poet."
        answers.append(tokenizer.read(other)[1])
    assert set(answers) <= {f" {answer}" for answer in REFUSALS} and len(set(answers)) > 2
    assert refused == encode_refusals(FORGET, tokenizer, None, seed=0)
    assert refused != encode_refusals(FORGET, tokenizer, None, seed=1)


@pytest.mark.parametrize("prompt", ["Who? ", "Who?"])
def test_a_refusal_is_set_off_from_a_verbatim_prompt(prompt):
    (example,) = encode_refusals([{"prompt": prompt, "completion": "A poet."}], Characters(), None, seed=0)
    whole = "".join(chr(token) for token in example["input_ids"][:-1])
    assert whole.startswith("Who? ") and whole.removeprefix("Who? ") in REFUSALS


def test_plain_text_cannot_be_refused():
    with pytest.raises(DataError, match="forget record 2 is plain text"):
        encode_refusals([FORGET[0], {"text": "Once upon a time."}], Characters(), None, seed=0)
    with pytest.raises(DataError, match="pass other answers to the same questions as alternate_dataset"):
        encode_refusals(encode_set(FORGET, "forget", Characters(), None), None, None, seed=0)


def test_padding_of_examples_is_taken_off():
    padded = {"input_ids": [0, 5, 6, 7, 0], "labels": [-100, -100, 6, 7, -100], "attention_mask": [0, 1, 1, 1, 0]}
    assert encode_set([padded], "forget", None, None) == [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]


@pytest.mark.parametrize("kind", ["torch", "numpy", "lists of tensors"])
def test_examples_as_tensors_or_arrays(kind):
    plain = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    if kind == "lists of tensors":
        source = [{key: torch.tensor(value) for key, value in example.items()} for example in plain]
    else:
        source = pytest.importorskip("datasets").Dataset.from_list(plain).with_format(kind)
        kept = encode_set(source, "forget", None, None, collated=True)
        assert [type(example["labels"]) for example in kept] == [torch.Tensor if kind == "torch" else np.ndarray] * 2
    assert encode_set(source, "forget", None, None) == plain
    with pytest.raises(DataError, match="the forget set is encoded already"):
        encode_refusals(source, Characters(), None, seed=0)


def test_examples_and_records_that_can_be_read_once():
    plain = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    assert encode_set(iter(plain), "forget", None, None) == plain
    tokenizer = Characters()
    assert encode_set(iter(FORGET), "forget", tokenizer, None) == encode_set(FORGET, "forget", tokenizer, None)
    assert encode_refusals(iter(FORGET), tokenizer, None, 0) == encode_refusals(FORGET, tokenizer, None, 0)


@pytest.mark.parametrize("labels", [[-100, 6], [[5], [6], [7]], [0.5, 6.0, 7.0]])
def test_examples_whose_labels_are_not_those_of_their_tokens(labels):
    with pytest.raises(DataError, match="example 1 of the forget set"):
        encode_set([{"input_ids": [5, 6, 7], "labels": labels}], "forget", None, None)


def test_other_examples_need_a_collator():
    other = [{"input_ids": [5, 6], "labels": 1}]
    with pytest.raises(DataError, match="example 1 of the forget set holds input_ids, labels and needs a collator"):
        encode_set(other, "forget", None, None)
    assert encode_set(other, "forget", None, None, collated=True) == other
