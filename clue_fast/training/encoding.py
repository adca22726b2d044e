"""The data sets of a training as examples: encoded, checked, and with other answers where an objective needs them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clue_fast.data import Example, Record, Source, encode, load_records, plain, read_rows
from clue_fast.errors import DataError
from clue_fast.training.objectives.refusal import REFUSALS
from clue_fast.training.pairing import Examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_set(
    source: Source | Examples,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int | None,
    collated: bool = False,
) -> list[Any]:
    """Returns a data set as examples that can be collated.

    Args:
        source: records, see ``clue_fast.data.load_records``, or examples with ``input_ids`` and ``labels``.
        name: what to call the set in errors.
        tokenizer, max_length: for records, see ``clue_fast.data.encode``.
        collated: the examples go to a collator of the user, who knows what to make of them.

    Raises:
        DataError: the set is empty or unreadable, or text without a tokenizer, or its examples hold more than
            the collator of this package pads.
    """
    rows = read_rows(source, name, keep_format=collated)
    if not _is_encoded(rows):
        records = load_records(rows, name)
        if tokenizer is None:
            raise DataError(f"the {name} set is text; pass the tokenizer as processing_class, or encode it")
        return encode(records, tokenizer, max_length, name)
    if collated:
        return list(rows)
    known = {"input_ids", "labels", "attention_mask"}
    examples = [{key: plain(value) for key, value in example.items()} for example in rows]
    for number, example in enumerate(examples, start=1):
        if set(example) - known or not all(map(_is_tokens, example.values())):
            raise DataError(
                f"example {number} of the {name} set holds {', '.join(sorted(example))} and needs a collator of its "
                "own; pass it as data_collator"
            )
        lengths = {key: len(value) for key, value in example.items()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{length} {key}" for key, length in lengths.items())
            raise DataError(f"example {number} of the {name} set has {found}; give each token one of each")
    return [_without_padding(example) for example in examples]


def encode_refusals(
    source: Source | Examples, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, seed: int
) -> list[Example]:
    """Returns the questions of a forget set with a refusal as the answer to each, drawn by the seed.

    Raises:
        DataError: the set is encoded already, or holds plain text, to which there is no other answer.
    """
    rows = read_rows(source, "forget")
    if _is_encoded(rows) or tokenizer is None:
        raise DataError(
            "the forget set is encoded already, so its answers cannot be replaced; pass other answers to the "
            "same questions as alternate_dataset"
        )
    refused = []
    for number, record in enumerate(load_records(rows, "forget")):
        if not record.prompt:
            raise DataError(f"forget record {number + 1} is plain text; only a question can be refused an answer")
        refused.append(_refused(record, random.Random(f"{seed} refusal {number}").choice(REFUSALS)))
    return encode(refused, tokenizer, max_length, "alternate")


def _refused(record: Record, answer: str) -> Record:
    joint = "" if record.prompt.endswith((" ", "\n")) or not record.verbatim else " "
    return replace(record, completion=joint + answer)


def _is_encoded(source: Any) -> bool:
    """Whether the rows of a data set are examples, and no records."""
    return (
        isinstance(source, list)
        and bool(source)
        and all(isinstance(item, Mapping) and "input_ids" in item and "labels" in item for item in source)
    )


def _is_tokens(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(token, int) for token in value)


def _without_padding(example: Mapping[str, Sequence[int]]) -> Example:
    mask = example.get("attention_mask") or [1] * len(example["input_ids"])
    return {
        key: [token for token, kept in zip(example[key], mask, strict=True) if kept] for key in ("input_ids", "labels")
    }
