"""Weights times the size of their inputs, summed over the weights of every unit, from forward passes alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.localization.owned import BIAS, COLUMNS, Owned, matrix, owned_parts
from clue_fast.statistics import Statistics

WEIGHTED_INPUT = "weighted_input"


class WeightInputRecorder:
    """At the end adds ``weighted_input`` to the statistics: sum over the weights w_ij of a unit of |w_ij| rms(z_j).

    It is added once for each record, so that its mean over the records is the sum itself, and merged statistics hold
    the mean of the recordings. rms(z_j) is the root mean square of input j over the counted tokens of a group: the
    norm of Wanda, made comparable between groups of different sizes. Set ``groups``, int8 [records, tokens], before
    each forward pass.

    Args:
        model: its modules are hooked, nothing is replaced.
        statistics: of the model; updated when this ends.

    Raises:
        SiteError: the weights of a unit lie in no linear module.
    """

    def __init__(self, model: nn.Module, statistics: Statistics) -> None:
        self.statistics = statistics
        self.groups = torch.zeros(0, 0, dtype=torch.int8, device="cpu")
        self._model = model
        self._by_module: dict[str, list[Owned]] = defaultdict(list)
        for owned in owned_parts(model, statistics):
            if owned.side != BIAS:
                self._by_module[owned.module].append(owned)
        self._squares: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> WeightInputRecorder:
        for path in self._by_module:
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._hook(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None and self._squares:
            self.statistics.allocate_record_sums(WEIGHTED_INPUT)
            weighted = self.weighted(torch.eye(len(self.statistics.groups), dtype=torch.bool, device="cpu"))
            self.statistics.record_sums[WEIGHTED_INPUT] += weighted * self.statistics.records[:, None]

    def count_records(self) -> None:
        """Counts the records of the last batch; call it once a batch."""
        of_record = self.groups.amax(dim=1).long()
        counts = torch.bincount(of_record, minlength=len(self.statistics.groups) + 1)
        self.statistics.records += counts[1:].to(self.statistics.records.device)

    @torch.no_grad()
    def weighted(self, members: Tensor) -> Tensor:
        """The sum over the weights of each unit of |w_ij| rms(z_j), z_j over all tokens of some groups together.

        Args:
            members: [rows, groups] bool, the groups of each row.

        Returns:
            [rows, units] float64, on the device of the statistics.
        """
        found = self.statistics.values.new_zeros(len(members), int(self.statistics.offsets[-1]))
        for path, parts in self._by_module.items():
            own = members.to(self._squares[path])
            rms = (own @ self._squares[path] / (own @ self._tokens[path]).clamp_min(1.0)).sqrt()
            weight = matrix(self._model.get_submodule(path)).detach().abs().double()
            for owned in parts:
                weighted = weight.sum(0) * rms if owned.side == COLUMNS else rms @ weight.T
                found[:, owned.units] += owned.per_unit(owned.take(weighted)).to(found.device)
        return found

    def _hook(self, path: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            group = self.groups.to(arguments[0].device)
            of_record = group.amax(dim=1)
            numbers = torch.arange(1, len(self.statistics.groups) + 1, device=group.device)
            members = (of_record == numbers[:, None]).double()
            counted = group != 0
            z = arguments[0].reshape(*group.shape, -1)
            squares = torch.where(counted[..., None], z.double(), 0.0).square().sum(1)
            self._squares[path] = self._squares.get(path, 0.0) + members @ squares
            tokens = counted.sum(1, keepdim=True).double()
            self._tokens[path] = self._tokens.get(path, 0.0) + members @ tokens

        return hook
