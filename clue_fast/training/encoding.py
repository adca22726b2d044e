"""The data sets of a training as examples: encoded, checked, and with other answers where an objective needs them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from clue_fast.data import Example, Record, Source, encode, load_records
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
    examples = _examples(source)
    if examples is None:
        records = load_records(source, name)
        if tokenizer is None:
            raise DataError(f"the {name} set is text; pass the tokenizer as processing_class, or encode it")
        return encode(records, tokenizer, max_length)
    if collated:
        return examples
    known = {"input_ids", "labels", "attention_mask"}
    for example in examples:
        if set(example) - known or not isinstance(example["labels"], Sequence):
            raise DataError(
                f"an example of the {name} set holds {', '.join(sorted(example))} and needs a collator of its own; "
                "pass it as data_collator"
            )
    return [_without_padding(example) for example in examples]


def encode_refusals(
    source: Source | Examples, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None, seed: int
) -> list[Example]:
    """Returns the questions of a forget set with a refusal as the answer to each, drawn by the seed.

    Raises:
        DataError: the set is encoded already, or holds plain text, to which there is no other answer.
    """
    if _examples(source) is not None or tokenizer is None:
        raise DataError(
            "the forget set is encoded already, so its answers cannot be replaced; pass other answers to the "
            "same questions as alternate_dataset"
        )
    refused = []
    for number, record in enumerate(load_records(source, "forget")):
        if not record.prompt:
            raise DataError(f"forget record {number + 1} is plain text; only a question can be refused an answer")
        refused.append(_refused(record, random.Random(f"{seed} refusal {number}").choice(REFUSALS)))
    return encode(refused, tokenizer, max_length)


def _refused(record: Record, answer: str) -> Record:
    joint = "" if record.prompt.endswith((" ", "\n")) or not record.verbatim else " "
    return replace(record, completion=joint + answer)


def _examples(source: Source | Examples) -> list[Any] | None:
    """The source as a list if it holds encoded examples, or None."""
    if isinstance(source, (str, PathLike, Mapping)):
        return None
    items = list(source)
    if items and all(isinstance(item, Mapping) and "input_ids" in item and "labels" in item for item in items):
        return items
    return None


def _without_padding(example: Mapping[str, Sequence[int]]) -> Example:
    mask = example.get("attention_mask") or [1] * len(example["input_ids"])
    return {
        key: [token for token, kept in zip(example[key], mask, strict=True) if kept] for key in ("input_ids", "labels")
    }
