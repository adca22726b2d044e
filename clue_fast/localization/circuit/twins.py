"""Corrupted twins: the same example with what the answer hinges on replaced, token for token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clue_fast.data import Example, Record, encode, encode_prompts
from clue_fast.errors import DataError, UnknownNameError
from clue_fast.labels import IGNORED_LABEL
from clue_fast.localization.circuit.attribution import Twin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORRUPTIONS = ("auto", "data", "subject", "answer")


def make_twins(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    corruption: str = "auto",
    max_length: int | None = None,
) -> list[Twin]:
    """Encodes records with a corrupted twin each, of as many tokens.

    - ``data``: the twin has the record's own ``corrupted_prompt``.
    - ``subject``: the prompt becomes that of the most similar record with another answer, so that only what tells
      the two apart, the subject, is replaced.
    - ``answer``: the answer becomes that of another record; the labels remain.
    - ``auto``: ``data`` where a record has a corrupted prompt, else ``subject``.

    Only the stretch in which the two differ is replaced; one of another length is cut, or its last token repeated.

    Args:
        records: clean records.
        tokenizer: of the model.
        name: of the data set, for errors.
        corruption: one of ``CORRUPTIONS``.
        max_length: longer records are cut, in tokens.

    Raises:
        DataError: a record has no corrupted prompt, or no other record lends it a subject or answer, or the twin is
            equal to the record before the last answer token.
        UnknownNameError: no such corruption.
    """
    if corruption not in CORRUPTIONS:
        raise UnknownNameError("corruption", corruption, CORRUPTIONS)
    examples = encode(records, tokenizer, max_length, name)
    prompts = [_prompt(example) for example in examples]
    twins = []
    for index, (record, example) in enumerate(zip(records, examples, strict=True)):
        prompt = prompts[index]
        answer = example["input_ids"][len(prompt) :]
        if corruption == "answer":
            donor = _other_answer(records, index, name)
            corrupted = prompt + _fitted(answer, examples[donor]["input_ids"][len(prompts[donor]) :])
        else:
            if corruption == "data" or (corruption == "auto" and record.corrupted_prompt is not None):
                source = _corrupted_prompt(record, tokenizer, f"record {index + 1} of the {name} set")
            else:
                source = prompts[_most_similar(records, prompts, index, name)]
            corrupted = _fitted(prompt, source) + answer
        last = max(i for i, label in enumerate(example["labels"]) if label != IGNORED_LABEL)
        if corrupted[:last] == example["input_ids"][:last]:
            raise DataError(
                f"record {index + 1} of the {name} set and its corrupted twin ({corruption}) have the same tokens "
                "before the last one of the answer; give it a corrupted_prompt, or choose another corruption"
            )
        twins.append(Twin(example["input_ids"], corrupted, example["labels"]))
    return twins


def _prompt(example: Example) -> list[int]:
    labels = example["labels"]
    length = next((i for i, label in enumerate(labels) if label != IGNORED_LABEL), len(labels))
    return example["input_ids"][:length]


def _corrupted_prompt(record: Record, tokenizer: PreTrainedTokenizerBase, where: str) -> list[int]:
    if record.corrupted_prompt is None:
        raise DataError(f"{where} has no corrupted_prompt; add the column, or let twins be made with 'subject'")
    changed = Record(record.corrupted_prompt, record.completion, history=record.history, verbatim=record.verbatim)
    return encode_prompts([changed], tokenizer)[0]


def _most_similar(records: Sequence[Record], prompts: Sequence[list[int]], index: int, name: str) -> int:
    """The record with another answer whose prompt shares the most tokens, for its length."""
    own = Counter(prompts[index])
    best, donor = -1.0, None
    for other, prompt in enumerate(prompts):
        if prompt == prompts[index] or records[other].completion == records[index].completion:
            continue
        shared = sum((own & Counter(prompt)).values())
        similarity = shared / max(len(prompt), len(prompts[index]))
        if similarity > best:
            best, donor = similarity, other
    if donor is None:
        raise DataError(
            f"no corrupted twin can be made of record {index + 1} of the {name} set: no other record has another "
            "prompt and answer; give it a corrupted_prompt"
        )
    return donor


def _other_answer(records: Sequence[Record], index: int, name: str) -> int:
    """The next record with another answer."""
    for step in range(1, len(records)):
        other = (index + step) % len(records)
        if records[other].completion != records[index].completion:
            return other
    raise DataError(
        f"no corrupted twin can be made of record {index + 1} of the {name} set: no other record has another answer"
    )


def _fitted(tokens: list[int], other: list[int]) -> list[int]:
    """The other tokens in the length of the first: what both begin and end with stays, the rest is cut or drawn out."""
    start = 0
    while start < min(len(tokens), len(other)) and tokens[start] == other[start]:
        start += 1
    end = 0
    while end < min(len(tokens), len(other)) - start and tokens[-1 - end] == other[-1 - end]:
        end += 1
    needed = len(tokens) - start - end
    middle = other[start : len(other) - end][:needed]
    if len(middle) < needed:
        fill = middle[-1] if middle else other[start - 1] if start else other[-1]
        middle = middle + [fill] * (needed - len(middle))
    return tokens[:start] + middle + tokens[len(tokens) - end :]
