"""How far a selection can be trusted: whether two halves of the data agree on it, and whether the labels matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d

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
