"""What trains: the selected slices of a parameter, their values, and how they get their gradient.

A selection becomes one ``TrainableSlice`` per parameter and category (``plan``); ``clue_fast.sparse.modules`` gives it
to the layer that owns the parameter. From then on the layer is where it is held: ``trainable_slices(model)`` finds it
again for the optimizer, for checkpoints and for ``Sparse``. The layer computes what it always did, and
``add_slice_grad`` makes the backward fill the gradient of the values.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from clue_fast.deprecated import RenamedAttribute
from clue_fast.errors import SparseError
from clue_fast.internals import is_view
from clue_fast.selection import CATEGORIES, CONFLICT, FORGET, Selection
from clue_fast.sites import ParamSlice
from clue_fast.sparse.shards import Shard, without_storage

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRAINED = (FORGET, CONFLICT)
SHARD_AFTER = (
    "load the model whole, call sparsify, and shard it after that with clue_fast.sparse.fully_shard in place of torch's"
)
"""What to do instead of sharding the weights in another way."""


class BatchLayout(NamedTuple):
    """What a forward pass runs over: the first ``forget`` of ``records`` are to be forgotten, of ``tokens`` each."""

    forget: int
    records: int
    tokens: int

    def forget_rows(self, x: Tensor, path: str) -> int:
        """Returns how many leading rows of [rows, features] or [records, tokens, features] are to be forgotten.

        Raises:
            SparseError: the rows are not the records of the batch.
        """
        if x.dim() > 2 and len(x) == self.records:
            return self.forget
        if x.dim() == 2 and len(x) == self.records * self.tokens:
            return self.forget * self.tokens
        raise SparseError(
            f"the input of {path} is {list(x.shape)} in a batch of {self.records} records of {self.tokens} tokens, so "
            "forget and retain records cannot be told apart in it; select its units as conflict units"
        )


@dataclass(eq=False)
class ForwardPass:
    """The layout of the batch that the model runs over, which says who trains the units of the category "forget".

    Set for one pass, and kept until the next begins, since gradient checkpointing runs layers again in backward.

    Attributes:
        next: layout of the next pass of the model; None if nobody said.
        layout: of the pass under way; None if all records train all units.
    """

    next: BatchLayout | None = None
    layout: BatchLayout | None = None

    def begin(self) -> None:
        """Starts a pass."""
        self.next, self.layout = None, self.next


@dataclass(eq=False)
class SliceIndex:
    """Which slices, int64 [k], sorted; shared by the parameters of a layer that train the same ones, so moved once."""

    tensor: Tensor


@dataclass(eq=False)
class TrainableSlice:
    """Slices of one parameter that train: which they are, and, once ``bind`` has given them to a layer, their state.

    Attributes:
        where: one of the units' slices of the parameter, which says the parameter, ``dim`` and ``expert_index``.
        shared_index: see ``index``.
        category: of their units, "forget" or "conflict".
        layer, layers: index of the transformer layer, and how many layers there are.
        module: the layer that owns the parameter.
        output_dim: dimension of the weight that counts the outputs of the layer: 0 as in ``nn.Linear``, 1 as in Conv1D.
        values: float32, shaped as the slices; the only parameter that trains.
        original: the slices as they were before training, in the dtype of the parameter.
        shard: which part of the slices this process owns, whose values, original, gradient and optimizer state it has,
            where FSDP2 shards the parameter (``clue_fast.sparse.fully_shard``); None where all of them.
        forward_pass: shared by all slices of a model; says which records train units of the category "forget".
        has_values: whether ``values`` hold anything, or have a shape and no storage, see ``keep_values``.
        keeps_masters: whether an optimizer asked for values where the weights cannot hold small updates themselves.
        swapped: whether the parameter holds the original values at the moment.
        rounding_seed: of stochastic rounding, where there are no values.
    """

    where: ParamSlice
    shared_index: SliceIndex = field(repr=False)
    category: str
    layer: int
    layers: int
    module: nn.Module = field(init=False, repr=False)
    output_dim: int = field(init=False)
    values: nn.Parameter = field(init=False, repr=False)
    original: Tensor = field(init=False, repr=False)
    forward_pass: ForwardPass = field(init=False, repr=False)
    shard: Shard | None = field(init=False, default=None)
    has_values: bool = field(init=False, default=True)
    keeps_masters: bool = field(init=False, default=False)
    swapped: bool = field(init=False, default=False)
    rounding_seed: int = field(init=False, default=0)
    selected = RenamedAttribute("values")
    lead = RenamedAttribute("expert_index")
    has_master = RenamedAttribute("has_values")
    master_name = RenamedAttribute("values_name")

    @property
    def path(self) -> str:
        """Path of the parameter in the model."""
        return self.where.parameter

    @property
    def module_path(self) -> str:
        """Path of the layer in the model."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """Name of the parameter in the layer, such as "weight"."""
        return self.path.rpartition(".")[2]

    @property
    def dim(self) -> int:
        """Dimension along which the slices lie, of the parameter or of ``parameter[expert_index]``."""
        return self.where.dim

    @property
    def expert_index(self) -> int | None:
        """Index into the first dimension of a parameter that stacks those of several experts, or None."""
        return self.where.expert_index

    @property
    def index(self) -> Tensor:
        """The slices, int64 [k], sorted."""
        return self.shared_index.tensor

    @property
    def values_name(self) -> str:
        """Name of the values in the layer."""
        expert = "" if self.expert_index is None else f"_{self.expert_index}"
        return f"values_{self.name}{expert}_{self.category}"

    @property
    def parameter(self) -> Tensor:
        """The parameter, whole; sharded, between passes, a DTensor of its whole shape."""
        parameter: Tensor = getattr(self.module, self.name)
        return parameter

    @property
    def remembered(self) -> Tensor | None:
        """What a forward pass remembers of the parameter, whose version tells a backward pass that it changed."""
        return self.parameter if self.shard is None else self.shard.gathered

    @property
    def weight(self) -> Tensor:
        """What ``dim`` counts in: the parameter, or the part of it that belongs to one expert, as a view.

        Sharded, the rows of it that this process holds: those of an expert that another one holds are none.

        Raises:
            SparseError: the parameter is sharded, and the slices are not.
        """
        if self.shard is None:
            if is_sharded(self.parameter):
                raise SparseError(f"{self.path} was sharded, its slices were not; {SHARD_AFTER}")
            return self.where.of(self.parameter.detach())
        held = self.shard.held(self.module, self.name)
        if self.expert_index is None:
            return held
        place = self.expert_index - self.shard.first
        return held[place] if 0 <= place < len(held) else held.new_empty(0, *held.shape[2:])

    @property
    def weight_index(self) -> Tensor:
        """The slices of this process, as ``weight`` counts them along ``dim``."""
        if self.shard is None or self.dim != 0:
            return self.index
        first = self.shard.first if self.expert_index is None else 0
        return self.index[self.shard.part] - first

    @property
    def leaf(self) -> nn.Parameter:
        """What the backward fills the gradient of, shaped as all slices: the values, or what stands for them."""
        return self.values if self.shard is None else self.shard.leaf

    @property
    def width(self) -> int:
        """How many slices the parameter, or that of an expert, has along ``dim``."""
        return self.parameter.shape[self.dim + (self.expert_index is not None)]

    def bind(self, module: nn.Module, output_dim: int, forward_pass: ForwardPass) -> None:
        """Takes the values from the layer that owns the parameter."""
        self.module, self.output_dim, self.forward_pass = module, output_dim, forward_pass
        self._move_index()
        self.original = self.read()
        self.values = nn.Parameter(self.original.to(torch.float32, copy=True))

    def keep_part(self, shard: Shard) -> None:
        """Keeps values and original of the part that this process owns alone; the weight has been sharded."""
        self.shard = shard
        device = self.weight.device
        self.values.data = self.own(self.values.detach()).to(device, copy=True)
        self.original = self.own(self.original).to(device, copy=True)
        self._move_index()

    def own(self, whole: Tensor) -> Tensor:
        """Returns this process's part of something shaped as all slices, as a view."""
        return whole if self.shard is None else whole[self.shard.part]

    def gather(self, own: Tensor) -> Tensor:
        """Returns the whole of something shaped as the values; every process has to call it where they are shared."""
        return own if self.shard is None else self.shard.gather(own)

    def train(self, trains: bool) -> None:
        """Lets the slices train, or freezes them."""
        for leaf in (self.values, self.leaf):
            leaf.requires_grad_(trains)
            if not trains:
                leaf.grad = None

    def own_master(self) -> Tensor | None:
        """Returns a copy of the slices where the weight, in float32, is the master of its values; else None."""
        own = self.keeps_masters and not self.has_values and self.weight.dtype == torch.float32
        return self.read() if own else None

    def follow_weight(self, values: Tensor, own_master: Tensor | None = None) -> None:
        """Goes where the weight is now.

        Args:
            values: as they were before it went. ``.to(bfloat16)`` casts every parameter; the values exist to keep what
                bfloat16 would drop.
            own_master: likewise; becomes the values of a weight that is no longer in float32.
        """
        if own_master is not None and self.weight.dtype != torch.float32:
            self.has_values = True
            self.values.data = own_master.to(self.weight.device)
            self.values.grad = None
        elif self.values.dtype != torch.float32 or not self.has_values:
            self.values.data = values.to(self.weight.device)
            self.values.grad = None
        self._move_index()
        self.original = self.original.to(self.weight)

    def _move_index(self) -> None:
        device = self.weight.device
        self.shared_index.tensor = self.shared_index.tensor.to(device)
        if self.shard is not None and self.shard.leaf.device != device:
            self.shard.leaf.data = without_storage(self.shard.leaf.shape, device)

    def keep_values(self, keep: bool) -> None:
        """Keeps values, made from the parameter, or none: then they have a shape and no storage.

        A weight in float32 is the master of its own values, so that a copy of them would say nothing more.
        DistributedDataParallel cannot do without the storage, so there it stays, unused.
        """
        self.keeps_masters = keep
        keep = keep and self.weight.dtype != torch.float32
        if keep == self.has_values:
            return
        self.has_values = keep
        if keep:
            self.values.data = self.read().float()
        elif self.shard is not None or not distributed.is_initialized():
            self.values.data = without_storage(self.values.shape, self.values.device)

    def master(self) -> Tensor:
        """Returns what the optimizer updates, float32: the values, or where there are none a copy of the slices."""
        return self.values.detach() if self.has_values else self.read().float()

    @torch.no_grad()
    def read(self) -> Tensor:
        """Returns a copy of the slices as they are in the parameter."""
        return self.weight.index_select(self.dim, self.weight_index)

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Writes values of the slices into the parameter, rounded to nearest even."""
        self.weight.index_copy_(self.dim, self.weight_index, values.to(self.parameter.dtype))
        mark_changed([self])

    def set_values(self, values: Tensor) -> None:
        """Gives the slices these values, in the parameter and, where they are kept, in ``values``."""
        self.write(values)
        self.refresh(values)

    def refresh(self, values: Tensor) -> None:
        """Sets ``values``, where they are kept, and leaves the parameter alone."""
        if self.has_values:
            self.values.detach().copy_(values)

    def only(self, places: Tensor) -> TrainableSlice:
        """Returns some of the slices, by their places in the index, as they were before; they have no values."""
        some = copy.copy(self)
        some.shared_index = SliceIndex(self.index[places])
        some.original = self.original.index_select(self.dim, places)
        some.has_values = False
        vars(some).pop("values", None)
        return some


def plan(selection: Selection) -> list[TrainableSlice]:
    """Returns what is to be trained of each parameter, in the order of the sites, bound to no model yet.

    Parameters of one layer with the same slices, such as a weight and its bias, share one index.

    Raises:
        SparseError: two units own the same slice of a parameter.
    """
    found: dict[tuple[str, int | None, int, int], tuple[ParamSlice, int, list[Tensor]]] = {}
    for site in selection.sites:
        for category in TRAINED:
            units = torch.nonzero(selection.categories[site] == category).flatten()
            for owned in site.slices if len(units) else ():
                key = (owned.parameter, owned.expert_index, owned.dim, category)
                found.setdefault(key, (owned, site.layer, []))[2].append(owned.index(units))
    layers = 1 + max((site.layer for site in selection.sites), default=0)
    planned: list[TrainableSlice] = []
    shared: dict[tuple[str, int], list[SliceIndex]] = {}
    for (parameter, _, _, category), (owned, layer, indices) in found.items():
        index = torch.cat(indices).sort().values
        known = shared.setdefault((parameter.rpartition(".")[0], category), [])
        same = next((other for other in known if torch.equal(other.tensor, index)), None)
        known.append(same or SliceIndex(index))
        planned.append(TrainableSlice(owned, known[-1], CATEGORIES[category], layer, layers))
    _check_disjoint(planned)
    return planned


def trainable_slices(model: nn.Module) -> Iterator[TrainableSlice]:
    """Yields what trains in all modules of a model, in the order of the modules."""
    for module in model.modules():
        yield from getattr(module, "trainable_slices", ())


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is spread over processes: a DTensor, or one that DeepSpeed ZeRO-3 has partitioned."""
    return hasattr(parameter, "placements") or hasattr(parameter, "ds_id")


def mark_changed(slices: Iterable[TrainableSlice]) -> None:
    """Has a forward pass from before refuse to be run backward with the weights from after it."""
    remembered = [tensor for trained in slices if (tensor := trained.remembered) is not None]
    torch.autograd.graph.increment_version(remembered)


def _check_disjoint(planned: list[TrainableSlice]) -> None:
    seen: dict[tuple[str, int | None], tuple[int, Tensor]] = {}
    for one in planned:
        dim, before = seen.get((one.path, one.expert_index), (one.dim, one.index[:0]))
        if dim != one.dim:
            raise SparseError(f"units own both rows and columns of {one.path}; select in one of their sites only")
        joined = torch.cat([before, one.index]).sort().values
        if bool((joined[1:] == joined[:-1]).any()):
            raise SparseError(f"two selected units own the same slice of {one.path}; select one of them")
        seen[one.path, one.expert_index] = (dim, joined)


def add_slice_grad(out: Tensor, x: Tensor, trained: TrainableSlice, rows: slice | Tensor | None = None) -> Tensor:
    """Returns the output of a linear layer, through which slices of its weight or bias get their gradient.

    Nothing is computed again: the output is the same, with another history.

    Args:
        out: [..., out_features], what the layer computed with the whole weight.
        x: [..., in_features], its input.
        trained: slices of the layer's weight or bias.
        rows: those of x that train them; by default all, or those to be forgotten, see ``ForwardPass``.
    """
    if not trained.leaf.requires_grad or not torch.is_grad_enabled():
        return out
    if rows is None:
        rows = slice(training_rows(x, trained))
    kept = x.detach()[rows]
    if len(kept) == 0:
        return out
    if trained.leaf.dim() == 1:
        same: Tensor = _Bias.apply(out, trained.leaf, trained.index, rows)  # type: ignore[no-untyped-call]
    else:
        transposed = trained.output_dim == 1
        same = _Weight.apply(  # type: ignore[no-untyped-call]
            out, kept, rows, trained.leaf, trained.index, trained.dim, transposed
        )
    return same


def training_rows(x: Tensor, trained: TrainableSlice) -> int:
    """Returns how many leading rows of the input of a layer train slices of it."""
    layout = trained.forward_pass.layout
    if layout is None or trained.category != CATEGORIES[FORGET]:
        return len(x)
    return layout.forget_rows(x, trained.path)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, rows: Any, values: Tensor, index: Tensor, dim: int, transposed: bool
    ) -> Tensor:
        kept = x if dim == int(transposed) else x.index_select(-1, index)
        ctx.save_for_backward(kept.to(out.dtype), index)
        ctx.rows, ctx.dim, ctx.transposed = rows, dim, transposed
        return with_history(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, index = ctx.saved_tensors
        found = torch.ops.clue_fast.sparse_linear_backward(grad[ctx.rows], kept, index, ctx.dim, ctx.transposed, None)
        return grad, None, None, found, None, None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, values: Tensor, index: Tensor, rows: Any) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = rows
        return with_history(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        chosen = grad[ctx.rows].reshape(-1, grad.shape[-1]).index_select(1, index)
        return grad, chosen.sum(0, dtype=torch.float32), None, None


def with_history(ctx: Any, out: Tensor) -> Tensor:
    """The same values with another history. No view where it can be avoided: models add to outputs in place."""
    if torch.compiler.is_compiling() or is_view(out):
        return out.view_as(out)
    ctx.mark_dirty(out)
    return out
