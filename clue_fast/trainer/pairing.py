"""Pairs records to forget with records to keep: the data set, the order and the batches of unlearning.

First how they are paired, then how the data sets of a training become examples: encoded, checked, and with other
answers where an objective needs them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from clue_fast.data import Example, Record, Source, answer_mask, check_disjoint, encode, load_records, plain, read_rows
from clue_fast.data.collator import check_examples
from clue_fast.errors import DataError
from clue_fast.objectives import REFUSALS
from clue_fast.statistics import DEFAULT_GROUPS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Examples: TypeAlias = "Sequence[Example]"


Pair: TypeAlias = "tuple[int, tuple[int, ...]]"
"""Index of a forget record, and those of the retain records beside it."""


class PairedRecords(Dataset[dict[str, list[Example]]]):
    """A forget example and the retain examples beside it, by the indices that ``PairSampler`` gives.

    With ``alternate``, other answers to the forget records in the same order, they come along.
    """

    def __init__(self, forget: Examples, retain: Examples, alternate: Examples | None = None) -> None:
        self.forget = forget
        self.retain = retain
        self.alternate = alternate

    def __len__(self) -> int:
        return len(self.forget)

    def __getitem__(self, pair: Pair) -> dict[str, list[Example]]:
        forget, retain = pair
        item = {"forget": [self.forget[forget]], "retain": [self.retain[index] for index in retain]}
        return item if self.alternate is None else {**item, "alternate": [self.alternate[forget]]}


class PairSampler(Sampler[Pair]):
    """Every forget record once an epoch; retain records in rounds, each of which uses every one once.

    Args:
        forget, retain: how many records there are.
        seed: the orders are a function of it and of the epoch alone.
        ratio: retain records beside each forget record.

    Attributes:
        epoch: which epoch the next iteration is.
    """

    def __init__(self, forget: int, retain: int, seed: int, ratio: int = 1) -> None:
        self.forget = forget
        self.retain = retain
        self.seed = seed
        self.ratio = ratio
        self.epoch = 0

    def __len__(self) -> int:
        return self.forget

    def __iter__(self) -> Iterator[Pair]:
        retained = self._retained(self.epoch * self.forget * self.ratio)
        for forget in self._shuffled("forget", self.forget, self.epoch):
            yield forget, tuple(islice(retained, self.ratio))

    def _retained(self, start: int) -> Iterator[int]:
        """The retain records of all rounds, one after another, from a place in that sequence on."""
        first, offset = divmod(start, self.retain)
        for number in count(first):
            yield from self._shuffled("retain", self.retain, number)[offset if number == first else 0 :]

    def _shuffled(self, name: str, size: int, number: int) -> list[int]:
        return random.Random(f"{self.seed} {name} {number}").sample(range(size), size)


class PairCollator:
    """Collates pairs into ``{"forget": batch, "retain": batch, ...}``, and plain examples into one plain batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pads and stacks the items."""
        if "forget" not in items[0]:
            return dict(self.collate(list(items)))
        return {name: dict(self.collate([one for item in items for one in item[name]])) for name in items[0]}


def grouped(batches: Mapping[str, Mapping[str, Tensor]], head: str) -> dict[str, dict[str, Tensor]]:
    """Says of every batch which tokens are of the groups forget and retain: those that predict its labels.

    Args:
        batches: with ``labels``.
        head: of the model, see ``clue_fast.data.collator``.

    Returns:
        The batches with ``token_group``, int8 in the shape of ``input_ids``, or [records] where labels are of
        records; of the decoder with ``decoder_token_group``, beside the encoder's tokens, which have no labels.
    """
    numbers = {name: number for number, name in enumerate(DEFAULT_GROUPS, start=1)}
    found = {}
    for name, batch in batches.items():
        labels, mask, number = batch["labels"], batch.get("attention_mask"), numbers.get(name, 0)
        counted, records = answer_mask(labels, head), torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        if head == "seq2seq":
            groups = {"token_group": records, "decoder_token_group": counted}
        elif head == "classification":
            groups = {"token_group": records}
        else:
            padded = mask is not None and mask.shape == labels.shape
            groups = {"token_group": counted & (mask != 0) if padded else counted}
        found[name] = {**batch, **{key: group.to(torch.int8) * number for key, group in groups.items()}}
    return found


def encode_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    forget_source: Source | Examples,
    retain_source: Source | Examples,
    alternate_source: Source | Examples | None,
    *,
    teaches: bool,
    max_length: int | None,
    collated: bool,
    seed: int,
) -> PairedRecords:
    """Returns the data sets of a training, encoded and checked.

    Args:
        model: that trains.
        tokenizer, max_length, collated: see ``encode_set``.
        forget_source, retain_source: see ``encode_set``.
        alternate_source: other answers to the forget records; None for refusals.
        teaches: whether the objective teaches other answers; otherwise there are none.
        seed: of the refusals.

    Raises:
        DataError: a set is empty or unreadable, forget and retain share records, or not every forget record has one
            other answer.
    """
    # Read once: the records to forget are looked at again for refusals.
    rows = read_rows(forget_source, "forget", keep_format=collated)
    forget = encode_set(rows, "forget", tokenizer, max_length, collated)
    retain = encode_set(retain_source, "retain", tokenizer, max_length, collated)
    if not collated:
        check_disjoint({"forget": forget, "retain": retain})
    alternate = None
    if teaches and alternate_source is None:
        alternate = encode_refusals(rows, tokenizer, max_length, seed)
    elif teaches and alternate_source is not None:
        alternate = encode_set(alternate_source, "alternate", tokenizer, max_length, collated)
    if alternate is not None and len(alternate) != len(forget):
        raise DataError(
            f"{len(alternate)} alternate answers to {len(forget)} forget records; give one to each, in order"
        )
    if not collated:
        for name, examples in (("forget", forget), ("retain", retain), ("alternate", alternate or [])):
            check_examples(examples, model, name)
    return PairedRecords(forget, retain, alternate)


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
