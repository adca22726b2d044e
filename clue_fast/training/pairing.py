"""Pairs records to forget with records to keep: the data set, the order and the batches of unlearning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from clue_fast.data import Example
from clue_fast.labels import answer_mask
from clue_fast.statistics import DEFAULT_GROUPS

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
        head: of the model, see ``clue_fast.labels``.

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
