"""Trained parts: the slices of one parameter that train, with their float32 master values.

Grafts the gradient of some slices of a weight onto what a layer has computed, without computing it again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from clue_fast.errors import SparseError
from clue_fast.selection import CATEGORIES, CONFLICT, FORGET, Selection
from clue_fast.sites import ParamSlice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRAINED = (FORGET, CONFLICT)
DDP = (
    "and train with DistributedDataParallel: gradients, masters and optimizer state are those of the selected units "
    "alone, so there is little left to shard"
)
"""What to do instead of sharding."""


class Pass(NamedTuple):
    """What a forward pass runs over: the first ``forget`` of ``records`` are to be forgotten, of ``tokens`` each."""

    forget: int
    records: int
    tokens: int


@dataclass(eq=False)
class Reach:
    """Which records train the units that matter to the forget set only: the forget records of a pass.

    Announced for one pass, and kept until the next, since gradient checkpointing runs layers again in backward.

    Attributes:
        announced: what the next pass of the model runs over; None if nobody said.
        current: what the pass under way runs over; None if all records train all units.
    """

    announced: Pass | None = None
    current: Pass | None = None

    def begin(self) -> None:
        """Starts a pass."""
        self.announced, self.current = None, self.announced

    def rows(self, x: Tensor, path: str) -> int:
        """Returns how many leading rows of [rows, features] or [records, tokens, features] are to be forgotten.

        Raises:
            SparseError: the rows are not the records of the pass.
        """
        if self.current is None:
            return len(x)
        forget, records, tokens = self.current
        if x.dim() > 2 and len(x) == records:
            return forget
        if x.dim() == 2 and len(x) == records * tokens:
            return forget * tokens
        raise SparseError(
            f"the input of {path} is {list(x.shape)} in a batch of {records} records of {tokens} tokens, so forget and "
            "retain records cannot be told apart in it; select its units as conflict units"
        )


@dataclass(eq=False)
class TrainedPart:
    """Slices of one parameter that train.

    Attributes:
        module: owns the parameter.
        name: of the parameter in it, such as "weight".
        path: of the parameter in the model.
        lead: index into the first dimension of a parameter that stacks those of several experts, or None.
        dim: dimension along which the slices lie, of the parameter or of ``parameter[lead]``.
        output_dim: dimension that counts the outputs of the layer: 0 as in ``nn.Linear``, 1 as in Conv1D.
        index: the slices, int64 [k], sorted.
        category: of their units, "forget" or "conflict".
        selected: master values, float32, shaped as the slices; the only thing that trains.
        original: the slices as they were before training, in the dtype of the parameter.
        layer, layers: index of the transformer layer, and how many layers there are.
        reach: which records train units of the category "forget".
        swapped: whether the parameter holds the original values at the moment.
        rounding_seed: of stochastic rounding, where there are no master values.
    """

    module: nn.Module = field(repr=False)
    name: str
    path: str
    lead: int | None
    dim: int
    output_dim: int
    index: Tensor = field(repr=False)
    category: str
    selected: nn.Parameter = field(repr=False)
    original: Tensor = field(repr=False)
    layer: int
    layers: int
    reach: Reach = field(repr=False)
    swapped: bool = False
    rounding_seed: int = 0
    has_master: bool = True

    @property
    def master_name(self) -> str:
        """Name of the master values in the module."""
        lead = "" if self.lead is None else f"_{self.lead}"
        return f"selected_{self.name}{lead}_{self.category}"

    @property
    def weight(self) -> Tensor:
        """What ``dim`` counts in: the parameter, or the part of it that belongs to one expert, as a view."""
        parameter: Tensor = getattr(self.module, self.name).detach()
        return parameter if self.lead is None else parameter[self.lead]

    def keep_master(self, keep: bool) -> None:
        """Keeps master values, made from the parameter, or none: then ``selected`` has a shape and no storage.

        DistributedDataParallel cannot do without the storage, so there it stays, unused.
        """
        if keep == self.has_master:
            return
        self.has_master = keep
        if keep:
            self.selected.data = self.read().float()
        elif not distributed.is_initialized():
            self.selected.data = torch.zeros((), device=self.selected.device).expand(self.selected.shape)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Returns a copy of the slices as they are in the parameter."""
        return self.weight.index_select(self.dim, self.index)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Writes values of the slices into the parameter, rounded to nearest even."""
        parameter = getattr(self.module, self.name)
        self.weight.index_copy_(self.dim, self.index, values.to(parameter.dtype))
        # A forward from before must not be run backward with the weights from after it.
        torch.autograd.graph.increment_version(parameter)

    def set_values(self, values: Tensor) -> None:
        """Gives the slices these values, in the parameter and in the masters."""
        self.write(values)
        self.set_master(values)

    def set_master(self, values: Tensor) -> None:
        """Gives the masters, if there are any, these values."""
        if self.has_master:
            self.selected.detach().copy_(values)


@dataclass(frozen=True)
class Slices:
    """Which slices of a parameter are to be trained: the plan of a ``TrainedPart``.

    Attributes:
        part: says which parameter, and along which dimension.
        index: the slices, int64, sorted.
        category: of their units.
        layer, layers: index of the transformer layer, and how many layers there are.
    """

    part: ParamSlice
    index: Tensor
    category: str
    layer: int
    layers: int


def plan(selection: Selection) -> list[Slices]:
    """Returns what is to be trained of each parameter, in the order of the sites.

    Parameters of one layer with the same slices, such as a weight and its bias, share one index.

    Raises:
        SparseError: two units own the same slice of a parameter.
    """
    found: dict[tuple[str, int | None, int, int], tuple[ParamSlice, int, list[Tensor]]] = {}
    for site in selection.sites:
        for category in TRAINED:
            units = torch.nonzero(selection.categories[site] == category).flatten()
            for part in site.slices if len(units) else ():
                key = (part.parameter, part.expert_index, part.dim, category)
                found.setdefault(key, (part, site.layer, []))[2].append(part.index(units))
    layers = 1 + max((site.layer for site in selection.sites), default=0)
    plans: list[Slices] = []
    shared: dict[tuple[str, int], list[Tensor]] = {}
    for (parameter, _, _, category), (part, layer, indices) in found.items():
        index = torch.cat(indices).sort().values
        known = shared.setdefault((parameter.rpartition(".")[0], category), [])
        known.append(next((other for other in known if torch.equal(other, index)), index))
        plans.append(Slices(part, known[-1], CATEGORIES[category], layer, layers))
    _check_disjoint(plans)
    return plans


def trained_parts(model: nn.Module) -> Iterator[TrainedPart]:
    """Yields the trained parts of all modules of a model, in the order of the modules."""
    for module in model.modules():
        yield from getattr(module, "trained_parts", ())


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is spread over processes: a DTensor, or one that DeepSpeed ZeRO-3 has partitioned."""
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_id")


def _check_disjoint(plans: list[Slices]) -> None:
    seen: dict[tuple[str, int | None], tuple[int, Tensor]] = {}
    for slices in plans:
        part = slices.part
        dim, before = seen.get((part.parameter, part.expert_index), (part.dim, slices.index[:0]))
        if dim != part.dim:
            raise SparseError(f"units own both rows and columns of {part.parameter}; select in one of their sites only")
        joined = torch.cat([before, slices.index]).sort().values
        if bool((joined[1:] == joined[:-1]).any()):
            raise SparseError(f"two selected units own the same slice of {part.parameter}; select one of them")
        seen[part.parameter, part.expert_index] = (dim, joined)


def graft(out: Tensor, x: Tensor, part: TrainedPart, rows: slice | Tensor | None = None) -> Tensor:
    """Returns the output of a linear layer, through which the slices of its weight or bias get their gradient.

    Args:
        out: [..., out_features], what the layer computed with the whole weight.
        x: [..., in_features], its input.
        part: of the layer's weight or bias.
        rows: those of x that train the part; by default those that may, see ``Reach``.
    """
    if not part.selected.requires_grad or not torch.is_grad_enabled():
        return out
    if rows is None:
        rows = slice(part.reach.rows(x, part.path) if part.category == "forget" else len(x))
    kept = x.detach()[rows]
    if len(kept) == 0:
        return out
    if part.selected.dim() == 1:
        grafted: Tensor = _Bias.apply(out, part.selected, part.index, rows)  # type: ignore[no-untyped-call]
    else:
        transposed = part.output_dim == 1
        grafted = _Weight.apply(  # type: ignore[no-untyped-call]
            out, kept, rows, part.selected, part.index, part.dim, transposed
        )
    return grafted


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, rows: Any, selected: Tensor, index: Tensor, dim: int, transposed: bool
    ) -> Tensor:
        kept = x if dim == int(transposed) else x.index_select(-1, index)
        ctx.save_for_backward(kept.to(out.dtype), index)
        ctx.rows, ctx.dim, ctx.transposed = rows, dim, transposed
        return _same(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, index = ctx.saved_tensors
        found = torch.ops.clue_fast.sparse_linear_backward(grad[ctx.rows], kept, index, ctx.dim, ctx.transposed, None)
        return grad, None, None, found, None, None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, selected: Tensor, index: Tensor, rows: Any) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = rows
        return _same(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        chosen = grad[ctx.rows].reshape(-1, grad.shape[-1]).index_select(1, index)
        return grad, chosen.sum(0, dtype=torch.float32), None, None


def _same(ctx: Any, out: Tensor) -> Tensor:
    """The same values with another history. No view where it can be avoided: models add to outputs in place."""
    if torch.compiler.is_compiling() or out._is_view():
        return out.view_as(out)
    ctx.mark_dirty(out)
    return out
