"""Attention heads: which modules have them, and which channels of their projections each head has, by running them.

How a model packs queries, keys and values, and how many heads share a key/value head, is not written in the shapes.
So the attention runs on made-up values in place of what its projections give, and each row of the batch turns the sign
of another block of channels of one projection. The block belongs to the heads whose channels of the output projection's
input change. Turning signs keeps norms, so that a normalization over all heads does not couple them.

Which blocks are queries, keys and values shows in the same way. The output of a head is linear in the values: where the
sign of some of them is turned, channels of it turn theirs and nothing else changes. The key of the first token is read
by later tokens as well, its query by none of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.internals import device_of, evaluation_mode
from clue_fast.sites.mlp import Unmatched
from clue_fast.sites.projection import Projection, projection_of
from clue_fast.sites.site import ParamSlice, Site, layer_index
from clue_fast.sites.trace import required_arguments, sample

ROWS = 128
TOKENS = 4
SCALE = 0.12  # of samples in [-6, 6]; small enough that no softmax is saturated, whichever way its scores are scaled
CHANGED = 0.01
READ_LATER = 0.05  # of what turning it for all tokens changes for later tokens; a query gives 0
HEAD_SIZES = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
QUERY, KEY, VALUE, OUTPUT = "query", "key", "value", "output"
Heads = frozenset[int]


class NoHeadsError(ValueError):
    """What a module calls heads are none that own anything, as those of a state-space model."""


class HeadTrace:
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
        self.width = output.inputs // size
        self.block_size = {p.path: math.gcd(size, p.outputs, *self._per_head(p)) for p in inputs}

    def heads(self) -> list[Site]:
        """Returns the heads: one site, or two where query heads share key/value heads.

        Raises ValueError if what the heads own does not lie at regular places; NoHeadsError if they own nothing.
        """
        query = (*self._slices(self.owners, self.queries), self.output.columns(self.size))
        if self.sharing == 1:
            return [self._site("attention_head", query, self.width, self.size)]
        key_value = self._slices(self.owners, self.groups)
        return [
            self._site("attention_query", query, self.width, self.size),
            self._site("attention_key_value", key_value, len(self.groups), self.sharing * self.size),
        ]

    def slices(self) -> list[Site]:
        """Returns the slices of the heads in single projections: queries, keys, values and output, a site each.

        Raises ValueError if they cannot be told apart, or do not lie at regular places.
        """
        roles = self._roles()
        sites = []
        for role, units in ((QUERY, self.queries), (KEY, self.groups), (VALUE, self.groups)):
            own = {
                path: [h if r == role else Heads() for h, r in zip(heads, roles[path], strict=True)]
                for path, heads in self.owners.items()
            }
            sites.append(self._rows_site(f"projection_{role}", self._slices(own, units), len(units)))
        slices = (self.output.columns(self.size),)
        return [*sites, self._site(f"projection_{OUTPUT}", slices, self.width, self.size)]

    @property
    def queries(self) -> list[Heads]:
        """Every head by itself."""
        return [Heads({head}) for head in range(self.width)]

    @property
    def groups(self) -> list[Heads]:
        """The heads of every key/value head."""
        return [Heads(range(first, first + self.sharing)) for first in range(0, self.width, self.sharing)]

    @property
    def sharing(self) -> int:
        """How many heads share a key/value head."""
        return max((len(heads) for found in self.owners.values() for heads in found), default=1)

    @cached_property
    def owners(self) -> dict[str, list[Heads]]:
        """The heads that each channel block of a projection leads to; only projections of which each block has some."""
        found: dict[str, list[Heads]] = {}
        for block in self._blocks(self.inputs):
            z = self._found(block)
            change = (z[1:] - z[0]).norm(dim=(1, 3)) / z[0].norm(dim=(0, 2)).clamp_min(1e-12)
            for (projection, _), row in zip(block, change, strict=True):
                found.setdefault(projection.path, []).append(Heads(torch.nonzero(row > CHANGED).flatten().tolist()))
        owners = {path: heads for path, heads in found.items() if all(heads)}
        if not owners:
            raise NoHeadsError("no rows of its projections belong to heads")
        return owners

    def _roles(self) -> dict[str, list[str]]:
        """Whether each channel block of the projections that heads own is of queries, keys or values."""
        found: dict[str, list[str]] = {}
        for block in self._blocks([p for p in self.inputs if p.path in self.owners]):
            z, first = self._found(block), self._found(block, first_token=True)
            sign = _distances(z[1:].abs(), z[0].abs()) < CHANGED * _distances(z[1:], z[0])
            later = _distances(first[1:, 1:], z[0, 1:]) > READ_LATER * _distances(z[1:, 1:], z[0, 1:])
            for (projection, _), is_value, is_key in zip(block, sign.tolist(), later.tolist(), strict=True):
                found.setdefault(projection.path, []).append(VALUE if is_value else KEY if is_key else QUERY)
        return found

    def _site(self, kind: str, slices: tuple[ParamSlice, ...], width: int, channels: int) -> Site:
        return Site(
            path=self.path,
            kind=kind,
            width=width,
            layer=layer_index(self.path),
            structure="heads",
            output=self.output.path,
            slices=slices,
            inputs=tuple(p.path for p in self._owned(slices)),
            channels=channels,
        )

    def _rows_site(self, kind: str, slices: tuple[ParamSlice, ...], width: int) -> Site:
        projections = self._owned(slices)
        if len(projections) > 1:
            raise ValueError(f"{kind} has rows in several projections: {', '.join(p.path for p in projections)}")
        channels = sum(owned.size for owned in slices if owned.parameter == projections[0].weight)
        return replace(self._site(kind, slices, width, channels), structure="rows", output=projections[0].path)

    def _owned(self, slices: Sequence[ParamSlice]) -> list[Projection]:
        return [p for p in self.inputs if any(owned.parameter == p.weight for owned in slices)]

    def _per_head(self, projection: Projection) -> list[int]:
        return [projection.outputs // self.width] if projection.outputs % self.width == 0 else []

    def _blocks(self, projections: Sequence[Projection]) -> Iterator[list[tuple[Projection, int]]]:
        """All channel blocks of projections, as many at a time as there are rows in a batch."""
        jobs = [(p, c) for p in projections for c in range(p.outputs // self.block_size[p.path])]
        for start in range(0, len(jobs), ROWS):
            yield jobs[start : start + ROWS]

    def _found(self, jobs: Sequence[tuple[Projection, int]], first_token: bool = False) -> Tensor:
        """What the heads find as it is, and with the sign of each channel block turned.

        Args:
            jobs: the channel blocks.
            first_token: turn the sign for the first token only.

        Returns:
            [1 + blocks, tokens, heads, size] float32.
        """
        rows = 1 + len(jobs)
        seen: list[Tensor] = []

        def replace(projection: Projection, seed: int) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
                if y.shape[0] != rows:
                    raise ValueError(f"{projection.path} does not see the rows of the batch apart")
                values = (sample(*y.shape[1:], seed=seed) * SCALE).expand(y.shape).clone()
                size = self.block_size[projection.path]
                turned = values.view(rows, -1, projection.outputs)[:, : 1 if first_token else None]
                for row, (other, block) in enumerate(jobs, start=1):
                    if other is projection:
                        turned[row, :, block * size : (block + 1) * size] *= -1.0
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
        return seen[0].float().reshape(rows, -1, self.width, self.size)

    def _slices(self, owners: dict[str, list[Heads]], units: Sequence[Heads]) -> tuple[ParamSlice, ...]:
        """What units, each a set of heads, own of the projections."""
        slices: list[ParamSlice] = []
        for projection in self.inputs:
            blocks = owners.get(projection.path, [])
            runs: dict[Heads, list[tuple[int, int]]] = {unit: [] for unit in units}
            position = 0
            for heads, members in groupby(blocks):
                length = len(list(members))
                if heads in runs:
                    runs[heads].append((position, length))
                position += length
            slices += self._regular(projection, [runs[unit] for unit in units])
        if not slices:
            raise ValueError("no rows of its projections belong to single heads")
        return tuple(slices)

    def _regular(self, projection: Projection, runs: Sequence[Sequence[tuple[int, int]]]) -> list[ParamSlice]:
        """Slices for the places of every unit's channel blocks, which must be the same distance apart."""
        size = self.block_size[projection.path]
        slices: list[ParamSlice] = []
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
            slices += projection.rows(
                starts[0] * size, strides[0] * size, lengths.pop() * size, block=block, gap=gap * size
            )
        return slices


def _distances(rows: Tensor, row: Tensor) -> Tensor:
    """Euclidean distance of each of the rows [rows, ...] from another one, [rows]."""
    distances: Tensor = (rows - row).flatten(1).norm(dim=1)
    return distances


FAMILIES = {"attention": HeadTrace.heads, "projection": HeadTrace.slices}


def head_size(module: nn.Module) -> int | None:
    """Returns the channels of one head in the output projection's input, if a module says that it has heads."""
    sizes = (getattr(module, name, None) for name in HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int)), None)


def find_heads(model: nn.Module, families: Sequence[str] = ("attention",)) -> dict[str, list[Site] | Unmatched]:
    """Returns the attention heads of a model, by the path of the module that has them.

    Args:
        model: runs a few times on a few tokens, in evaluation mode and without gradients, and stays as it is.
        families: "attention" for whole heads: one site a module, or two where query heads share key/value heads;
            "projection" for their slices in single projections: four sites a module. Where there is none, why not.
    """
    projections = _projections(model)
    heads = {path: size for path, module in model.named_modules() if (size := head_size(module)) is not None}
    cores = [
        _Core(path, model.get_submodule(path), size, _decodes(model))
        for path, size in heads.items()
        if any(p.startswith(f"{path}.") for p in projections) and not any(p.startswith(f"{path}.") for p in heads)
    ]
    if not cores:
        return {}
    with evaluation_mode(model), torch.no_grad():
        failure = _watch(model, projections, cores, _text_run(model))
        for core in cores:
            inner = [p for path, p in projections.items() if path.startswith(f"{core.path}.")]
            if core.run is None and required_arguments(core.module) == 1:
                failure = _watch(model, projections, [core], _direct_run(core.module, inner[0].inputs)) or failure
        return {core.path: core.sites(model, families, failure) for core in cores}


def _projections(model: nn.Module) -> dict[str, Projection]:
    """The projections of a model by path, without those inside of adapters."""
    found = {path: p for path, module in model.named_modules() if (p := projection_of(module, path)) is not None}
    return {
        path: p for path, p in found.items() if not any(path[:end] in found for end, c in enumerate(path) if c == ".")
    }


@dataclass
class _Core:
    """An attention module, and what was seen of it.

    Attributes:
        path, module, size: where and what it is, and the channels of one of its heads.
        decodes: whether the model has an encoder and a decoder.
        run: makes it run on a number of rows, or None if it never ran.
        calls: the projections called inside it, in order, with what each was given.
        output: the projection that reads what the heads give.
    """

    path: str
    module: nn.Module
    size: int
    decodes: bool = False
    run: Callable[[int], None] | None = None
    calls: list[tuple[Projection, Tensor]] = field(default_factory=list)
    output: Projection | None = None

    def close(self) -> None:
        """At the end of the forward: the last projection is that of the output, unless it reads what others read."""
        last, given = self.calls[-1] if self.calls else (None, None)
        if given is not None and len(self.calls) > 1 and not any(_same(given, x) for _, x in self.calls[:-1]):
            self.output = last
            self.calls.pop()

    def sites(self, model: nn.Module, families: Sequence[str], failure: str | None) -> list[Site] | Unmatched:
        """The sites of the heads, or why there are none."""
        reason = failure or "token ids alone do not make it run"
        if self.run is not None and self.output is not None:
            inputs = list({p.path: p for p, _ in self.calls}.values())
            try:
                measured = HeadTrace(model, self.path, self.size, inputs, self.output, self.run)
                return [self._crossed(site) for family in families for site in FAMILIES[family](measured)]
            except NoHeadsError:
                return []
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                reason = str(error).splitlines()[0]
        reason = f"its heads could not be measured: {reason}"
        return Unmatched(self.path, type(self.module).__name__, reason, "attention")

    def _crossed(self, site: Site) -> Site:
        """The site, marked if it is of keys or values that are not of what the first projection was given."""
        given = {projection.path: x for projection, x in self.calls}
        others = site.structure == "rows" and not _same(given[site.output], self.calls[0][1])
        return replace(site, reads_encoder=True) if self.decodes and others else site


def _same(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape)


class _Watcher:
    """Follows one run: which projections are called inside which attention, and which comes after it."""

    def __init__(self, run: Callable[[int], None]) -> None:
        self.run = run
        self.inside: _Core | None = None
        self.waiting: _Core | None = None

    def enter(self, core: _Core) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if core.run is None:
                core.run, self.inside = self.run, core

        return hook

    def leave(self, core: _Core) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.inside is core:
                core.close()
                self.inside, self.waiting = None, core if core.output is None else None

        return hook

    def call(self, projection: Projection) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inside is not None:
                self.inside.calls.append((projection, args[0] if args else next(iter(kwargs.values()))))
            elif self.waiting is not None:
                self.waiting.output, self.waiting = projection, None

        return hook


def _watch(
    model: nn.Module, projections: dict[str, Projection], cores: Sequence[_Core], run: Callable[[int], None]
) -> str | None:
    """Runs once, and lets the cores see what happens; returns why it failed, or None."""
    watcher = _Watcher(run)
    handles = []
    for core in cores:
        handles.append(core.module.register_forward_pre_hook(watcher.enter(core)))
        handles.append(core.module.register_forward_hook(watcher.leave(core)))
    for path, projection in projections.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(watcher.call(projection), with_kwargs=True))
    try:
        run(1)
    except Exception as error:  # any model may need anything; what it says is in the report
        for core in cores:
            core.run = None
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def _text_run(model: nn.Module) -> Callable[[int], None]:
    body = getattr(model, "base_model", None)
    body = body if isinstance(body, nn.Module) else model
    device = device_of(model)
    decodes = _decodes(model)

    def run(rows: int) -> None:
        ids = torch.arange(3, 3 + TOKENS, device=device).expand(rows, TOKENS)
        body(input_ids=ids, **({"decoder_input_ids": ids} if decodes else {}))

    return run


def _decodes(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _direct_run(module: nn.Module, channels: int) -> Callable[[int], None]:
    like = next(module.parameters())

    def run(rows: int) -> None:
        module(sample(1, TOKENS, channels, seed=0).to(like.device, like.dtype).expand(rows, TOKENS, channels))

    return run
