"""Makes a model train its selected units only, without changing what it computes or how it is saved.

The slices of the selected units (rows of gate and up, columns of down) get a float32 copy, their values: the only
parameters that train. The forward reads the full weights, as ever; the backward fills the gradient of the values
alone; the optimizer writes them back into the weights. Weights in float32 hold their values themselves: there the
optimizer gives up the copy, and the parameter that trains has a shape and a gradient, and no storage. When the model
turns to another selection, slices that stay keep their values, and what no longer trains keeps its weights
(``transfer_state``).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clue_fast.deprecated import RenamedAttribute
from clue_fast.errors import NonFiniteError, SparseError
from clue_fast.selection import Selection
from clue_fast.sites.projection import is_linear
from clue_fast.sparse.lower_layers import LowerLayers
from clue_fast.sparse.modules import (
    SparseModule,
    SparseProjection,
    check_layer,
    inject,
    limit_checkpointing,
    restore,
    sparse_class,
)
from clue_fast.sparse.shards import norm_of_all, own_part
from clue_fast.sparse.slices import (
    DTYPES,
    SHARD_AFTER,
    BatchLayout,
    TrainableSlice,
    is_sharded,
    plan,
    trainable_slices,
)


class Removable(Protocol):
    """A hook, until it is removed."""

    def remove(self) -> None:
        """Removes it."""


class Sparse:
    """A model of which only the selected weights train; made by ``sparsify``.

    Also a context manager that restores the model at its end.

    Attributes:
        model: the model, changed in place.
        selection: what trains in it.
        retired: slices that trained before ``reselect`` chose others; they keep their trained values, and ``original``
            still takes them back.
        hooks: to be removed with ``restore``: on the model, and of trainers.
        original_outputs: what objectives keep of the original model's outputs, until other weights are loaded.
        lower_layers: what is kept of the outputs of the layers below the lowest one that trains; nothing, unless its
            ``most_bytes`` is set, as trainers do.
        backward_by_pass: whether objectives may run each pass of a step backward as soon as it ran forward, for a loss
            that hands on the gradients, see ``Objective.loss``; trainers set it where gradients are not scaled.
        packed_tokens: of a row, into which objectives pack the records of a step; None, unless trainers set it.
    """

    parts = RenamedAttribute("slices")
    reach = RenamedAttribute("set_batch_layout")

    def __init__(self, model: nn.Module, selection: Selection, planned: Sequence[TrainableSlice]) -> None:
        self.model = model
        self.selection = selection
        self.retired: list[TrainableSlice] = []
        self.original_outputs: dict[Hashable, Tensor] = {}
        self.lower_layers = LowerLayers(model, (one.path for one in planned))
        loading = model.register_load_state_dict_post_hook(self._forget_outputs)  # type: ignore[no-untyped-call]
        self.backward_by_pass = False
        self.packed_tokens: int | None = None
        self.hooks: list[Removable] = [loading]
        self._restored = False
        self._flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        parameters = list(model.parameters())
        inject(model, planned)
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._watch_passes()

    def _forget_outputs(self, *_: object) -> None:
        """Drops what the weights before gave."""
        self.original_outputs.clear()
        self.lower_layers.clear()

    def _watch_passes(self) -> None:
        """Has the model say when a pass begins, where it matters who trains what."""
        slices = self.slices
        self._forward_pass = forward_pass = slices[0].forward_pass
        self._pass_hook: RemovableHandle | None = None
        if any(trained.category == "forget" for trained in slices):
            self._pass_hook = self.model.register_forward_pre_hook(lambda *_: forward_pass.begin())

    def _unwatch_passes(self) -> None:
        if self._pass_hook is not None:
            self._pass_hook.remove()
            self._pass_hook = None

    @property
    def slices(self) -> list[TrainableSlice]:
        """What trains, in the order of the modules that hold it."""
        return [] if self._restored else list(trainable_slices(self.model))

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """The values of all slices, float32; read what they are at with ``TrainableSlice.master``."""
        return [trained.values for trained in self.slices]

    def restore(self) -> None:
        """Puts classes and ``requires_grad`` flags back to what they were; trained weights stay."""
        for shard in (trained.shard for trained in self.slices if trained.shard is not None):
            shard.unit.reshard()
            for exchange in shard.hooks:
                exchange.remove()
        self._restore_layers()
        self._unwatch_passes()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._flags.get(name, parameter.requires_grad))
        for hook in self.hooks:
            hook.remove()
        self.retired, self._flags, self.hooks, self._restored = [], {}, [], True
        self._forget_outputs()

    def reselect(self, selection: Selection) -> None:
        """Trains other units from now on. What was trained before stays as it is, and trains no more.

        Units that stay selected keep their values. ``original`` and ``revert`` still take back everything that ever
        trained. The values are new parameters: tell the optimizer (``SparseOptimizer.rebuild_param_groups``), or make
        a new one.

        Raises:
            SelectionError, SparseError, NonFiniteError: see ``sparsify``; the model then trains what it did.
        """
        before = self.slices
        if any(trained.swapped for trained in before):
            raise SparseError("the model holds its original weights; select anew outside Sparse.original()")
        if any(trained.shard is not None for trained in before):
            raise SparseError("the model is sharded by FSDP2, for these units; select anew before it is sharded")
        selection.check(self.model)
        planned = plan(selection)
        _check_dims([*before, *self.retired], planned)
        self._restore_layers()
        try:
            check_model(self.model, planned)
        except Exception:
            planned = plan(self.selection)
            raise
        else:
            self.selection = selection
        finally:
            inject(self.model, planned)
            self.retired = transfer_state([*before, *self.retired], planned)
            self.lower_layers.choose(self.model, (one.path for one in planned))
            self._unwatch_passes()
            self._watch_passes()

    def _restore_layers(self) -> None:
        for module in {trained.module: None for trained in self.slices}:
            assert isinstance(module, SparseModule)
            restore(module)

    def train_only(self, *categories: str) -> None:
        """Trains the units of these categories, of "forget" and "conflict", and freezes the others."""
        for trained in self.slices:
            trained.train(trained.category in categories)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scales the gradients of all slices down to a norm, as ``torch.nn.utils.clip_grad_norm_`` does.

        Where FSDP2 shards the model the norm is that over all processes, every one of which has to call this; torch's
        function would take that of one process's part.

        Args:
            max_norm: of all gradients together, at most.

        Returns:
            The norm that they had.
        """
        slices = self.slices
        gradients = [(grad, trained.shard) for trained in slices if (grad := trained.values.grad) is not None]
        total = norm_of_all(gradients)
        torch.nn.utils.clip_grads_with_norm_([trained.values for trained in slices], max_norm, total)
        return total

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        """Says what the next forward pass runs over, so that retain records train conflict units only.

        Unless it is said, all records train all units.

        Args:
            forget: how many of the records are to be forgotten; they come first in the batch.
            records: how many records there are.
            tokens: how many tokens each of them has in the batch.
        """
        self._forward_pass.next = BatchLayout(forget, records, tokens)

    def limit_checkpointing(self) -> None:
        """Keeps the backward above the lowest selected layer; call it after gradient checkpointing is turned on.

        Trainers of this package do. Without it checkpointing is as correct, and runs a backward through all layers.
        """
        limit_checkpointing(self.model, self.slices)

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The model as it was before training, for as long as the context lasts.

        Swaps the original selected values into the weights and afterwards the current ones back, bit for bit.
        Gradients are off inside. A forward pass from before it can no longer be run backward, which raises:
        the weights that it remembers have been written to.

        Raises:
            SparseError: inside another such context.
        """
        slices = self.slices
        if any(trained.swapped for trained in slices):
            raise SparseError("the model holds its original weights already; do not nest Sparse.original()")
        with torch.no_grad():
            current: list[tuple[TrainableSlice, Tensor]] = []
            try:
                for trained in [*slices, *self.retired]:
                    current.append((trained, trained.read()))
                    trained.swapped = True
                    trained.write(trained.original)
                yield self.model
            finally:
                for trained, weights in current:
                    trained.write(weights)
                    trained.swapped = False

    @contextmanager
    def moved(self, offsets: Iterable[Tensor]) -> Iterator[nn.Module]:
        """The model with its trained weights so far from where they are, for as long as the context lasts.

        For gradients that are taken elsewhere than where they are applied, as in sharpness-aware and in meta steps.
        Afterwards the weights have the bits that they had; ``values``, their gradients and optimizer state are left
        alone, so step the optimizer outside. A forward pass can be run backward within the context that it began in
        only.

        Args:
            offsets: for each of ``slices``, of the shape of its values; added to the values, and then rounded to the
                precision of the weights.

        Raises:
            SparseError: inside ``original``.
            ValueError: there is not one offset for each of the slices.
        """
        slices = self.slices
        if any(trained.swapped for trained in slices):
            raise SparseError("the model holds its original weights; move its weights outside Sparse.original()")
        pairs = list(zip(slices, offsets, strict=True))
        before = [trained.read() for trained in slices]
        try:
            for trained, offset in pairs:
                trained.write(trained.master() + offset)
            yield self.model
        finally:
            for trained, weights in zip(slices, before, strict=True):
                trained.write(weights)

    def revert(self) -> None:
        """Puts the original values back for good, into weights and values; optimizer state is left alone."""
        for trained in self.slices:
            trained.set_values(trained.original)
        for retired in self.retired:
            retired.write(retired.original)

    def memory_footprint(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Counts the bytes that exist right now, tensor by tensor; of a sharded model, those of this process.

        Returns:
            weights: of the model without the values of slices; values: of slices; original: kept for ``original()``;
            gradients: of every parameter; optimizer_state: all tensors in the optimizer, 0 without one.
        """
        slices = self.slices
        values = {id(trained.values) for trained in slices}
        parameters = list(self.model.parameters())
        state = [] if optimizer is None else [t for entry in optimizer.state.values() for t in entry.values()]
        return {
            "weights": sum(own_part(p).nbytes for p in parameters if id(p) not in values),
            "values": sum(trained.values.nbytes for trained in slices if trained.has_values),
            "original": sum(trained.original.nbytes for trained in [*slices, *self.retired]),
            "gradients": sum(own_part(p.grad).nbytes for p in parameters if p.grad is not None),
            "optimizer_state": sum(t.nbytes for t in state if isinstance(t, Tensor)),
        }

    def bytes(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """The name that ``memory_footprint`` had, with "trainable" for the values."""
        warnings.warn(
            "Sparse.bytes is memory_footprint now, and its trainable values; the old name goes with the next release",
            FutureWarning,
            stacklevel=2,
        )
        found = self.memory_footprint(optimizer)
        return {"trainable" if name == "values" else name: size for name, size in found.items()}

    def __repr__(self) -> str:
        trained = sum(one.leaf.numel() for one in self.slices)
        values = {id(one.values) for one in self.slices}
        total = sum(p.numel() for p in self.model.parameters() if id(p) not in values)
        return (
            f"Sparse({len(self.selection)} units in {len({trained.module for trained in self.slices})} modules: "
            f"{trained:,} of {total:,} weights train, {trained / total:.2%})"
        )

    def __enter__(self) -> Sparse:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def sparsify(model: nn.Module, selection: Selection) -> Sparse:
    """Makes a model train its selected units only: rows of gate and up, columns of down.

    The model still computes the same bits, ``state_dict`` and ``save_pretrained`` give a plain checkpoint,
    and ``restore`` undoes it. All other parameters are frozen, so no backward runs below the lowest selected
    layer.

    Args:
        model: changed in place, with weights in float32, bfloat16 or float16.
        selection: made for this model.

    Raises:
        SelectionError: the selection is empty or belongs to another model.
        SparseError: the model is sparse already, or a layer cannot train in parts (quantized, tied, not
            plain linear).
        NonFiniteError: a selected weight is NaN or infinite; names the parameter.
    """
    if next(trainable_slices(model), None) is not None:
        raise SparseError("the model is sparse already; call restore() of the Sparse that made it so")
    selection.check(model)
    planned = plan(selection)
    check_model(model, planned)
    return Sparse(model, selection, planned)


def transfer_state(before: Iterable[TrainableSlice], after: Iterable[TrainableSlice]) -> list[TrainableSlice]:
    """Gives what trains now the original weights and the values of the slices that trained before.

    Returns:
        What trained before, or had by then, and does not now.
    """
    retired = []
    of_weight: defaultdict[tuple[str, int | None], list[TrainableSlice]] = defaultdict(list)
    for new in after:
        of_weight[new.path, new.expert_index].append(new)
    for old in before:
        gone = torch.ones_like(old.index, dtype=torch.bool)
        for new in of_weight[old.path, old.expert_index]:
            mine, theirs = _common(new.index, old.index)
            gone[theirs] = False
            new.original.index_copy_(new.dim, mine, old.original.index_select(new.dim, theirs))
            if old.has_values:
                new.values.detach().index_copy_(new.dim, mine, old.values.detach().index_select(new.dim, theirs))
        if bool(gone.any()):
            retired.append(old.only(torch.nonzero(gone).flatten()))
    return retired


def _common(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the values that two sorted indices have in common, in each of them."""
    places = torch.searchsorted(other, one).clamp_max(len(other) - 1)
    found = torch.nonzero(other[places] == one).flatten()
    return found, places[found]


def _check_dims(before: Iterable[TrainableSlice], planned: Iterable[TrainableSlice]) -> None:
    """Raises SparseError if a parameter that trained by rows is to train by columns, or the other way round."""
    dims = {(trained.path, trained.expert_index): trained.dim for trained in before}
    for one in planned:
        dim = dims.get((one.path, one.expert_index), one.dim)
        if dim != one.dim:
            raise SparseError(f"{one.path} trained along dimension {dim}; keep to it")


def check_model(model: nn.Module, planned: Iterable[TrainableSlice]) -> None:
    """Raises SparseError or NonFiniteError unless all of this can train in a model, see ``sparsify``."""
    shared = _shared_weights(model)
    for one in planned:
        check_layer(model, one)
        _check_weight(model, one, shared)


Spans: TypeAlias = "dict[int, list[tuple[int, int, str]]]"
"""By storage, from which address up to which one parameters lie in it, and their names."""


def _shared_weights(model: nn.Module) -> Spans:
    """Where all parameters lie: some may be views of others."""
    spans: Spans = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = own_part(parameter.detach())
        length = 1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
        begin = own.data_ptr()
        end = begin + (length * own.element_size() if own.numel() else 0)
        spans.setdefault(own.untyped_storage().data_ptr(), []).append((begin, end, name))
    return spans


def _tied(spans: Spans, parameter: Tensor, name: str) -> list[str]:
    """Names of the other parameters that lie where one does, or in parts of it."""
    lying = spans[parameter.untyped_storage().data_ptr()]
    begin, end = next((begin, end) for begin, end, own in lying if own == name)
    return [other for first, last, other in lying if other != name and first < end and begin < last]


def _check_weight(model: nn.Module, planned: TrainableSlice, shared: Spans) -> None:
    name = planned.path
    parameter = model.get_parameter(name)
    if is_sharded(parameter):
        raise SparseError(f"{name} is sharded already (FSDP2, ZeRO-3 or tensor parallel); {SHARD_AFTER}")
    if parameter.device.type == "meta":
        raise SparseError(f"{name} is on the meta device; load the weights first")
    if parameter.dtype not in DTYPES:
        raise SparseError(f"{name} is {parameter.dtype}; load the model in float32, bfloat16 or float16")
    if not parameter.is_contiguous():
        raise SparseError(f"{name} is not contiguous; set it to its contiguous()")
    if others := _tied(shared, parameter, name):
        raise SparseError(f"{name} is tied to {', '.join(others)}; untie it")
    weight = planned.where.of(parameter.detach())
    index = planned.index.to(weight.device)
    if int(index[-1]) >= weight.shape[planned.dim] or int(index[0]) < 0:
        raise SparseError(
            f"{name} has {weight.shape[planned.dim]} slices along dimension {planned.dim}, a selected unit "
            f"owns {int(index[-1])}; localize on this model"
        )
    if not bool(weight.index_select(planned.dim, index).isfinite().all()):
        raise NonFiniteError(f"{name} holds NaN or infinite values; load the model again")
    module = model.get_submodule(planned.module_path)
    cls = sparse_class(module)
    if cls is not None and issubclass(cls, SparseProjection) and not is_linear(module):
        raise SparseError(
            f"{name} is that of a {type(module).__name__}, which does more than multiply by it; merge or dequantize it"
        )
