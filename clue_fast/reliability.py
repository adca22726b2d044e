"""How far a selection can be trusted: whether two halves of the data agree on it, and whether the labels matter.

Records are dealt into blocks. Nearly everything that is measured is a sum over records, so one pass that keeps a sum
for each block serves the true labels, forget and retain, every half of the data and every exchange of labels between
blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from itertools import cycle, zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from clue_fast.errors import SettingError
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

if TYPE_CHECKING:
    from clue_fast.data import Record
    from clue_fast.selection import Selection

BLOCKS = 8
"""Of the smaller set, and of the larger one so many as make twice that number in all: 12,870 ways to label them."""

SPLITS = 5
"""Ways to halve the data, over which the overlap is averaged."""

HARDLY, SOMEWHAT = 0.05, 0.25
"""Shares of the way from chance to full agreement, in words."""

FEW = 0.1
"""Share of the labellings among which the true one still stands out, in words."""


@dataclass(frozen=True)
class Reliability:
    """What the data say about a selection that was made from them.

    Attributes:
        overlap: Jaccard index of the units selected from one random half of the records of each set and those selected
            from the other half, the mean over ``splits`` ways to halve them; None where a set cannot be halved.
        chance: what the index would be if units were drawn at random, as many of each layer.
        splits: how often the records were halved.
        score: mean score of the selected units.
        permuted: the same of units selected, at the same budget, after the labels forget and retain of records were
            exchanged at random; one mean a permutation.
        reason: why there is nothing of it, or None.
    """

    overlap: float | None = None
    chance: float | None = None
    splits: int = 0
    score: float | None = None
    permuted: tuple[float, ...] = ()
    reason: str | None = None

    @property
    def rank(self) -> int | None:
        """Place of the true labels among all labellings by ``score``, 1 for the highest; ties count against them."""
        return 1 + sum(other >= self.score for other in self.permuted) if self.score is not None else None

    @property
    def sentence(self) -> str:
        """All of it in words."""
        if self.reason is not None:
            return f"how far the selection depends on the records was not measured: {self.reason}"
        parts = []
        if self.overlap is not None and self.chance is not None:
            beyond = (self.overlap - self.chance) / (1.0 - self.chance) if self.chance < 1.0 else 0.0
            how = "hardly" if beyond < HARDLY else "somewhat" if beyond < SOMEWHAT else "much"
            parts.append(
                f"two halves of the data select the same units {how} more often than chance "
                f"({_short(self.overlap)}, chance {_short(self.chance)})"
            )
        if self.rank is not None and self.permuted:
            labellings = 1 + len(self.permuted)
            how = "never " if self.rank == 1 else "seldom " if self.rank <= FEW * labellings else ""
            parts.append(f"labels exchanged at random {how}do as well (rank {self.rank} of {labellings})")
        return "; ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON holds it, with ``rank`` and the number of labellings, ``of``."""
        if self.reason is not None:
            return {"reason": self.reason}
        values = {**asdict(self), "permuted": list(self.permuted), "rank": self.rank, "of": 1 + len(self.permuted)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Reliability:
        """Reads what ``as_dict`` gave."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        return cls(**{**known, "permuted": tuple(known.get("permuted", ()))})


def _short(share: float) -> str:
    """Two digits, as ``.05``."""
    return f"{share:.2f}".lstrip("0") if share < 1.0 else f"{share:.2f}"


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


@lru_cache(maxsize=64)
def chance_overlap(widths: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """The Jaccard index to expect of two independent random draws of units.

    The number of units in both is, layer by layer, hypergeometric; its distribution over all layers is their
    convolution.

    Args:
        widths: units of each layer.
        first, second: units that each draw takes of each layer.
    """
    least, shared = 0, torch.ones(1, dtype=torch.float64, device="cpu")
    for width, a, b in zip(widths, first, second, strict=True):
        low, own = _hypergeometric(width, a, b)
        shared = conv1d(shared[None, None], own.flip(0)[None, None], padding=len(own) - 1)[0, 0]
        below, shared = _trimmed(shared)
        least += low + below
    both = least + torch.arange(len(shared), dtype=torch.float64, device="cpu")
    either = sum(first) + sum(second) - both
    overlap = torch.where(either > 0, both / either, 1.0)
    return float((shared * overlap).sum() / shared.sum())


def _hypergeometric(width: int, a: int, b: int) -> tuple[int, Tensor]:
    """The least number in both of two draws of a and b out of so many, and the probabilities from there on."""
    low = max(0, a + b - width)
    both = torch.arange(low, min(a, b) + 1, dtype=torch.float64, device="cpu")

    def log_ways(total: float | Tensor, chosen: Tensor) -> Tensor:
        total = torch.as_tensor(total, dtype=torch.float64, device="cpu")
        return torch.lgamma(total + 1) - torch.lgamma(chosen + 1) - torch.lgamma(total - chosen + 1)

    below, probabilities = _trimmed((log_ways(float(a), both) + log_ways(float(width - a), b - both)).softmax(0))
    return low + below, probabilities


def _trimmed(probabilities: Tensor) -> tuple[int, Tensor]:
    """Probabilities without what is next to nothing at either end, and how many were cut off in front."""
    kept = torch.nonzero(probabilities > 1e-15 * probabilities.max()).flatten()
    first, last = int(kept[0]), int(kept[-1])
    return first, probabilities[first : last + 1]
