"""What is kept of trained units while a model turns from one selection to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clue_fast.errors import SparseError
from clue_fast.training.parts import Slices, TrainedPart


@dataclass
class Kept:
    """Original and master values of every slice that trains or has trained, part by part."""

    trained: list[tuple[TrainedPart, Tensor | None]]

    @classmethod
    def of(cls, parts: Iterable[TrainedPart], retired: Iterable[TrainedPart]) -> Kept:
        """Takes them from the parts, whose master values are about to go."""
        masters = [(part, part.selected.detach() if part.has_master else None) for part in parts]
        return cls([*masters, *((part, None) for part in retired)])

    def check(self, plans: Iterable[Slices]) -> None:
        """Raises SparseError if a parameter that trained by rows is to train by columns, or the other way round."""
        dims = {(part.path, part.lead): part.dim for part, _ in self.trained}
        for part in (slices.part for slices in plans):
            dim = dims.get((part.parameter, part.lead), part.dim)
            if dim != part.dim:
                raise SparseError(f"{part.parameter} trained along dimension {dim}; keep to it")

    def give(self, parts: list[TrainedPart]) -> list[TrainedPart]:
        """Gives new parts the values of the slices that they share with those kept.

        Returns:
            Parts of the slices that are in none of the new ones.
        """
        retired = []
        of_weight: defaultdict[tuple[str, int | None], list[TrainedPart]] = defaultdict(list)
        for part in parts:
            of_weight[part.path, part.lead].append(part)
        for before, master in self.trained:
            gone = torch.ones_like(before.index, dtype=torch.bool)
            for part in of_weight[before.path, before.lead]:
                mine, theirs = _shared(part.index, before.index)
                gone[theirs] = False
                part.original.index_copy_(part.dim, mine, before.original.index_select(part.dim, theirs))
                if master is not None:
                    part.selected.detach().index_copy_(part.dim, mine, master.index_select(part.dim, theirs))
            if bool(gone.any()):
                left = torch.nonzero(gone).flatten()
                original = before.original.index_select(before.dim, left)
                retired.append(replace(before, index=before.index[left], original=original))
        return retired


def _shared(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the values that two sorted indices have in common, in each of them."""
    places = torch.searchsorted(other, one).clamp_max(len(other) - 1)
    found = torch.nonzero(other[places] == one).flatten()
    return found, places[found]
