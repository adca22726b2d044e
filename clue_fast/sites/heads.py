"""Heads: what they own of the projections of their attention, measured.

How a model packs queries, keys and values, and how many heads share a key/value head, is not written in the shapes.
So the attention runs on made-up values in place of what its projections give, and each row of the batch turns the sign
of another stretch of channels of one projection. The stretch belongs to the heads whose part of the output
projection's input changes. Turning signs keeps norms, so that a normalization over all heads does not couple them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.sites.projection import Projection
from clue_fast.sites.rehearsal import sample
from clue_fast.sites.site import Part, Site, layer_index

ROWS = 128
SCALE = 0.12  # of samples in [-6, 6]; small enough that no softmax is saturated, whichever way its scores are scaled
CHANGED = 0.01

Heads = frozenset[int]


class Measurement:
    """One attention module, measured.

    Args:
        model: that it is part of.
        path: of the module.
        size: channels of a head.
        inputs: the projections before the heads.
        output: the projection after them.
        run: makes the module run on a number of rows.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        size: int,
        inputs: Sequence[Projection],
        output: Projection,
        run: Callable[[int], None],
    ) -> None:
        if output.inputs % size:
            raise ValueError(f"{output.path} reads {output.inputs} channels, no multiple of the head size {size}")
        self.model, self.path, self.size, self.run = model, path, size, run
        self.inputs, self.output = inputs, output
        self.heads = output.inputs // size
        self.stretch = {p.path: math.gcd(size, p.outputs, *self._per_head(p)) for p in inputs}

    def sites(self) -> list[Site]:
        """Returns the sites. Raises ValueError if what the heads own does not lie at regular places."""
        owners = self._owners()
        sharing = max((len(heads) for found in owners.values() for heads in found), default=0)
        queries = [frozenset({head}) for head in range(self.heads)]
        if sharing <= 1:
            parts = (*self._parts(owners, queries), self.output.columns(self.size))
            return [self._site("attention_head", parts, self.heads, self.size)]
        groups = [frozenset(range(first, first + sharing)) for first in range(0, self.heads, sharing)]
        query = (*self._parts(owners, queries), self.output.columns(self.size))
        key_value = self._parts(owners, groups)
        return [
            self._site("attention_query", query, self.heads, self.size),
            self._site("attention_key_value", key_value, len(groups), sharing * self.size),
        ]

    def _site(self, kind: str, parts: tuple[Part, ...], width: int, channels: int) -> Site:
        owned = [p.path for p in self.inputs if any(part.parameter == p.weight for part in parts)]
        return Site(
            path=self.path,
            kind=kind,
            width=width,
            layer=layer_index(self.path),
            structure="heads",
            output=self.output.path,
            parts=parts,
            inputs=tuple(owned),
            channels=channels,
        )

    def _per_head(self, projection: Projection) -> list[int]:
        return [projection.outputs // self.heads] if projection.outputs % self.heads == 0 else []

    def _owners(self) -> dict[str, list[Heads]]:
        """The heads that each stretch of each projection leads to; only projections of which each leads to some."""
        jobs = [(p, c) for p in self.inputs for c in range(p.outputs // self.stretch[p.path])]
        found: dict[str, list[Heads]] = {}
        for start in range(0, len(jobs), ROWS):
            block = jobs[start : start + ROWS]
            for (projection, _), heads in zip(block, self._changed(block), strict=True):
                found.setdefault(projection.path, []).append(heads)
        return {path: heads for path, heads in found.items() if all(heads)}

    def _changed(self, jobs: Sequence[tuple[Projection, int]]) -> list[Heads]:
        """For each stretch, the heads that change when its sign is turned."""
        rows = 1 + len(jobs)
        seen: list[Tensor] = []

        def replace(projection: Projection, seed: int) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
                if y.shape[0] != rows:
                    raise ValueError(f"{projection.path} does not see the rows of the batch apart")
                values = (sample(*y.shape[1:], seed=seed) * SCALE).expand(y.shape).clone()
                size = self.stretch[projection.path]
                for row, (other, stretch) in enumerate(jobs, start=1):
                    if other is projection:
                        values[row, ..., stretch * size : (stretch + 1) * size] *= -1.0
                return values.to(y.device, y.dtype)

            return hook

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else next(iter(kwargs.values())))

        handles = [
            self.model.get_submodule(p.path).register_forward_hook(replace(p, seed))
            for seed, p in enumerate(self.inputs)
        ]
        output = self.model.get_submodule(self.output.path)
        handles.append(output.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            self.run(rows)
        finally:
            for handle in handles:
                handle.remove()
        z = seen[0].float().reshape(rows, -1, self.heads, self.size)
        change = (z[1:] - z[0]).norm(dim=(1, 3)) / z[0].norm(dim=(0, 2)).clamp_min(1e-12)
        return [frozenset(torch.nonzero(row > CHANGED).flatten().tolist()) for row in change]

    def _parts(self, owners: dict[str, list[Heads]], units: Sequence[Heads]) -> tuple[Part, ...]:
        """What units, each a set of heads, own of the projections."""
        parts: list[Part] = []
        for projection in self.inputs:
            stretches = owners.get(projection.path, [])
            runs: dict[Heads, list[tuple[int, int]]] = {unit: [] for unit in units}
            position = 0
            for heads, members in groupby(stretches):
                length = len(list(members))
                if heads in runs:
                    runs[heads].append((position, length))
                position += length
            parts += self._regular(projection, [runs[unit] for unit in units])
        if not parts:
            raise ValueError("no rows of its projections belong to single heads")
        return tuple(parts)

    def _regular(self, projection: Projection, runs: Sequence[Sequence[tuple[int, int]]]) -> list[Part]:
        """Parts for the places of every unit's stretches, which must be the same distance apart."""
        size = self.stretch[projection.path]
        parts: list[Part] = []
        for places in zip(*runs, strict=True):
            starts, lengths = [start for start, _ in places], {length for _, length in places}
            strides = [after - before for before, after in pairwise(starts)] or [places[0][1]]
            # Query heads may lie in blocks, with the key/value head that they share after each.
            block = next((unit for unit, stride in enumerate(strides, start=1) if stride != strides[0]), None)
            gap = 0 if block is None else strides[block - 1] - strides[0]
            expected = [
                starts[0] + u * strides[0] + (0 if block is None else u // block * gap) for u in range(len(starts))
            ]
            if starts != expected or len(lengths) > 1:
                raise ValueError(f"what heads own of {projection.path} does not lie at regular places")
            parts += projection.rows(
                starts[0] * size, strides[0] * size, lengths.pop() * size, block=block, gap=gap * size
            )
        return parts
