"""Statistics by block of records, from which the reliability of a selection is seen.

Records are dealt into blocks. Nearly everything that is measured is a sum over records, so one pass that keeps a sum
for each block serves the true labels, forget and retain, every half of the data and every exchange of labels between
blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest

import torch
from torch import Tensor

from clue_fast.data import Record
from clue_fast.errors import SettingError
from clue_fast.reliability import Reliability, chance_overlap
from clue_fast.selection import Selection
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

BLOCKS = 8
"""Of the smaller set, and of the larger one so many as make twice that number in all: 12,870 ways to label them."""

SPLITS = 5
"""Ways to halve the data, over which the overlap is averaged."""


@dataclass(frozen=True)
class Block:
    """Records of one set that keep their label together.

    Attributes:
        group: "forget" or "retain".
        records: their places in the set.
        exchangeable: whether labels are exchanged with it. A block that holds what is left of the larger set is not:
            the sets would change their sizes.
    """

    group: str
    records: tuple[int, ...]
    exchangeable: bool = True


@dataclass(frozen=True)
class BlockStatistics:
    """Statistics by block of records.

    Attributes:
        statistics: group g is block g - 1.
        blocks: what is in each of them.
        regrouped: what is no sum over records, of groups that are put together: from [rows, blocks] bool to means over
            their records by name, each [rows, units] float64; None if everything is such a sum.
    """

    statistics: Statistics
    blocks: Sequence[Block]
    regrouped: Callable[[Tensor], Mapping[str, Tensor]] | None = None

    def labelled(self, labels: Tensor) -> Iterator[Statistics]:
        """Yields the statistics of forget and retain data under other labels, in turn.

        Args:
            labels: [labellings, 2, blocks] bool, which blocks are forget data and which are retain data.
        """
        means = {} if self.regrouped is None else self.regrouped(labels.flatten(0, 1))
        for number, members in enumerate(labels):
            statistics = self.statistics.regroup(members)
            for name, values in means.items():
                own = values.reshape(*labels.shape[:2], -1)[number].to(statistics.values.device)
                statistics.record_sums[name] = own * statistics.records[:, None]
            yield statistics

    @property
    def truth(self) -> Tensor:
        """The labels that the data have, [2, blocks] bool."""
        return torch.tensor([[block.group == group for block in self.blocks] for group in DEFAULT_GROUPS], device="cpu")

    def permuted(self, number: int, seed: int) -> Tensor:
        """Labels exchanged at random between blocks of one size, [number, 2, blocks] bool."""
        generator = torch.Generator().manual_seed(seed)
        labels = self.truth.repeat(number, 1, 1)
        by_size: dict[int, list[int]] = {}
        for place, block in enumerate(self.blocks):
            if block.exchangeable:
                by_size.setdefault(len(block.records), []).append(place)
        for own in labels:
            for places in by_size.values():
                order = torch.randperm(len(places), generator=generator, device="cpu")
                own[:, places] = own[:, torch.tensor(places, device="cpu")[order]]
        return labels

    def halves(self, number: int, seed: int) -> Tensor:
        """The true labels in each of two random halves of the blocks, [number, 2 halves, 2, blocks] bool.

        There are none where a set is one block.
        """
        truth = self.truth
        if int(truth.sum(1).min()) < 2:
            return torch.zeros(0, 2, *truth.shape, dtype=torch.bool, device="cpu")
        generator = torch.Generator().manual_seed(seed)
        first = torch.zeros(number, len(self.blocks), dtype=torch.bool, device="cpu")
        for half in first:
            for own in truth:
                places = torch.nonzero(own).flatten()
                order = places[torch.randperm(len(places), generator=generator, device="cpu")]
                half[order[: len(order) // 2]] = True
        return torch.stack([truth & first[:, None], truth & ~first[:, None]], dim=1)


def check_permutations(permutations: int) -> None:
    """Raises SettingError unless it is a whole number from 0 on."""
    if isinstance(permutations, bool) or not (permutations >= 0 and permutations == int(permutations)):
        raise SettingError(f"permutations {permutations} is not a whole number from 0 (none) on")


def deal(forget: Sequence[Record], retain: Sequence[Record], seed: int) -> list[Block]:
    """Deals the records of both sets into blocks at random.

    The smaller set makes ``BLOCKS`` blocks, or one of each record. The larger one makes blocks of the same sizes; what
    is left of it then makes two more, which keep their label. Which records come together depends on the seed and on
    what they say, not on their order. Blocks of forget and of retain records take turns, forget first.
    """
    sets = dict(zip(DEFAULT_GROUPS, (forget, retain), strict=True))
    small, large = sorted(sets, key=lambda group: len(sets[group]))
    orders = {group: _shuffled(records, seed) for group, records in sets.items()}
    number = min(BLOCKS, len(sets[small]))
    blocks = [Block(small, tuple(sorted(orders[small][start::number]))) for start in range(number)]
    left = orders[large]
    for size, _ in zip(cycle([len(block.records) for block in blocks]), range(2 * BLOCKS - number), strict=False):
        if len(left) < size:
            break
        blocks.append(Block(large, tuple(sorted(left[:size]))))
        left = left[size:]
    blocks += [Block(large, tuple(sorted(left[start::2])), exchangeable=False) for start in range(min(2, len(left)))]
    by_set = ([block for block in blocks if block.group == group] for group in DEFAULT_GROUPS)
    return [block for pair in zip_longest(*by_set) for block in pair if block is not None]


def _shuffled(records: Sequence[Record], seed: int) -> list[int]:
    """The places of records in an order that depends on the seed and on each of them, not on the order they have."""

    def digest(place: int) -> bytes:
        return hashlib.sha256(f"{seed} {records[place].key!r}".encode("utf-8", "surrogatepass")).digest()

    return sorted(range(len(records)), key=digest)


def reliability(
    measured: BlockStatistics,
    select: Callable[[Statistics], Selection],
    selection: Selection,
    permutations: int,
    seed: int,
) -> Reliability:
    """Compares a selection with those from halves of the data and from exchanged labels.

    Args:
        measured: what the selection was made from, by block.
        select: from statistics to the selection at the same budget.
        selection: that of the true labels.
        permutations: how often labels are exchanged.
        seed: of the exchanges and the halves.
    """
    if len(selection) == 0:
        return Reliability(reason="no unit is selected")
    halves = measured.halves(SPLITS, seed)
    labels = torch.cat([measured.permuted(permutations, seed), halves.flatten(0, 1)])
    whole = measured.statistics.regroup(measured.truth)
    found: list[Selection] = []
    for statistics in measured.labelled(labels):
        if bool(((statistics.count == 0) & (whole.count > 0)).any()):
            return Reliability(reason="some units see tokens of a few records only")
        found.append(select(statistics))
    permuted, split = found[:permutations], found[permutations:]
    pairs = list(zip(split[::2], split[1::2], strict=True))
    return Reliability(
        overlap=_mean([one.overlap(other) for one, other in pairs]),
        chance=_mean([_chance(one, other) for one, other in pairs]),
        splits=len(pairs),
        score=_mean_score(selection),
        permuted=tuple(_mean_score(other) for other in permuted),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _chance(one: Selection, other: Selection) -> float:
    widths = tuple(site.width for site in one.sites)
    first, second = (tuple(len(own.units(site)) for site in own.sites) for own in (one, other))
    return chance_overlap(widths, first, second)


def _mean_score(selection: Selection) -> float:
    scores = torch.cat([selection.scores[site][selection.units(site)] for site in selection.sites])
    return float(scores.double().mean())
