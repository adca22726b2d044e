"""What is kept of trained units while a model turns from one selection to the next.

Makes a model train its selected units only, without changing what it computes or how it is saved.

The slices of the selected units (rows of gate and up, columns of down) get a float32 copy, the master values: the
only parameters that train. The forward reads the full weights, as ever; the backward fills the gradient of the
masters alone; the optimizer writes them back into the weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clue_fast.errors import NonFiniteError, SparseError
from clue_fast.selection import Selection
from clue_fast.sparse.modules import (
    SparseModule,
    SparseProjection,
    is_linear,
    limit_checkpointing,
    original_class,
    output_dim,
    sparse_class,
)
from clue_fast.sparse.slices import DDP, DTYPES, Pass, Reach, Slices, TrainedPart, is_sharded, plan, trained_parts


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
            dim = dims.get((part.parameter, part.expert_index), part.dim)
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


class Sparse:
    """A model of which only the selected weights train; made by ``sparsify``.

    Also a context manager that restores the model at its end.

    Attributes:
        model: the model, changed in place.
        selection: what trains in it.
        parts: the trained parts, in the order of the sites.
        retired: parts that trained before ``reselect`` chose others; they keep their trained values, and ``original``
            still takes them back.
        hooks: on the model, to be removed with ``restore``.
    """

    def __init__(self, model: nn.Module, selection: Selection, parts: list[TrainedPart]) -> None:
        self.model = model
        self.selection = selection
        self.retired: list[TrainedPart] = []
        self.hooks: list[RemovableHandle] = []
        self._take(parts)
        masters = {id(part.selected) for part in parts}
        self._flags = [(p, p.requires_grad) for p in model.parameters() if id(p) not in masters]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
            parameter.grad = None

    def _take(self, parts: list[TrainedPart]) -> None:
        self.parts = parts
        self._reach = reach = parts[0].reach
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        if any(part.category == "forget" for part in parts):
            self.hooks.append(self.model.register_forward_pre_hook(lambda *_: reach.begin()))

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """The master values of every part, float32."""
        return [part.selected for part in self.parts]

    def restore(self) -> None:
        """Puts classes and ``requires_grad`` flags back to what they were; trained weights stay."""
        self._turn_back()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for hook in self.hooks:
            hook.remove()
        self.parts, self.retired, self._flags, self.hooks = [], [], [], []

    def reselect(self, selection: Selection) -> None:
        """Trains other units from now on. What was trained before stays as it is, and trains no more.

        Units that stay selected keep their master values. ``original`` and ``revert`` still take back everything
        that ever trained. The masters are new parameters: tell the optimizer (``SparseOptimizer.follow``), or make a
        new one.

        Raises:
            SelectionError, SparseError, NonFiniteError: see ``sparsify``; the model then trains what it did.
        """
        if any(part.swapped for part in self.parts):
            raise SparseError("the model holds its original weights; select anew outside Sparse.original()")
        selection.check(self.model)
        plans = plan(selection)
        before = Kept.of(self.parts, self.retired)
        before.check(plans)
        self._turn_back()
        try:
            _check(self.model, plans)
        except Exception:
            plans = plan(self.selection)
            raise
        else:
            self.selection = selection
        finally:
            parts = make_parts(self.model, plans)
            self.retired = before.give(parts)
            self._take(parts)

    def _turn_back(self) -> None:
        for module in {part.module: None for part in self.parts}:
            _turn_back(module)

    def train_only(self, *categories: str) -> None:
        """Trains the units of these categories, of "forget" and "conflict", and freezes the others."""
        for part in self.parts:
            part.selected.requires_grad_(part.category in categories)
            if part.category not in categories:
                part.selected.grad = None

    def reach(self, forget: int, records: int, tokens: int) -> None:
        """Says what the next forward pass runs over, so that retain records train conflict units only.

        Unless it is said, all records train all units.

        Args:
            forget: how many of the records are to be forgotten; they come first in the batch.
            records: how many records there are.
            tokens: how many tokens each of them has in the batch.
        """
        self._reach.announced = Pass(forget, records, tokens)

    def limit_checkpointing(self) -> None:
        """Keeps the backward above the lowest selected layer; call it after gradient checkpointing is turned on.

        Trainers of this package do. Without it checkpointing is as correct, and runs a backward through all layers.
        """
        limit_checkpointing(self.model, self.parts)

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The model as it was before training, for as long as the context lasts.

        Swaps the original selected values into the weights and afterwards the current ones back, bit for bit.
        Gradients are off inside. A forward pass from before it can no longer be run backward, which raises:
        the weights that it remembers have been written to.

        Raises:
            SparseError: inside another such context.
        """
        if any(part.swapped for part in self.parts):
            raise SparseError("the model holds its original weights already; do not nest Sparse.original()")
        with torch.no_grad():
            current: list[tuple[TrainedPart, Tensor]] = []
            try:
                for part in [*self.parts, *self.retired]:
                    current.append((part, part.read()))
                    part.swapped = True
                    part.write(part.original)
                yield self.model
            finally:
                for part, values in current:
                    part.write(values)
                    part.swapped = False

    def revert(self) -> None:
        """Puts the original values back for good, into weights and masters; optimizer state is left alone."""
        for part in self.parts:
            part.set_values(part.original)
        for part in self.retired:
            part.write(part.original)

    def bytes(self, optimizer: torch.optim.Optimizer | None = None) -> dict[str, int]:
        """Counts the bytes that exist right now, tensor by tensor.

        Returns:
            weights: of the model without masters; trainable: masters; original: kept for ``original()``;
            gradients: of every parameter; optimizer_state: all tensors in the optimizer, 0 without one.
        """
        masters = {id(p) for p in self.trainable_parameters}
        parameters = list(self.model.parameters())
        state = [] if optimizer is None else [t for entry in optimizer.state.values() for t in entry.values()]
        return {
            "weights": sum(p.nbytes for p in parameters if id(p) not in masters),
            "trainable": sum(part.selected.nbytes for part in self.parts if part.has_master),
            "original": sum(part.original.nbytes for part in [*self.parts, *self.retired]),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer_state": sum(t.nbytes for t in state if isinstance(t, Tensor)),
        }

    def __repr__(self) -> str:
        trained = sum(p.numel() for p in self.trainable_parameters)
        total = sum(p.numel() for p in self.model.parameters()) - trained
        return (
            f"Sparse({len(self.selection)} units in {len({part.module for part in self.parts})} modules: "
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
    if next(trained_parts(model), None) is not None:
        raise SparseError("the model is sparse already; call restore() of the Sparse that made it so")
    selection.check(model)
    plans = plan(selection)
    _check(model, plans)
    return Sparse(model, selection, make_parts(model, plans))


def make_parts(model: nn.Module, plans: list[Slices]) -> list[TrainedPart]:
    """Turns the layers of the planned slices sparse, whatever they hold. Raises SparseError if one cannot be."""
    for slices in plans:
        _check_layer(model, slices)
    reach = Reach()
    indices: dict[int, Tensor] = {}  # on the device of the model, one for all parts of a layer that have the same
    return [_turn_sparse(model, slices, reach, indices) for slices in plans]


def _check(model: nn.Module, plans: list[Slices]) -> None:
    shared = _shared_weights(model)
    for slices in plans:
        _check_layer(model, slices)
        _check_weight(model, slices, shared)


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of all parameters by the address of their data."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return names


def _check_layer(model: nn.Module, slices: Slices) -> None:
    path = slices.part.parameter.rpartition(".")[0]
    module = model.get_submodule(path)
    if "base_layer" in path.split("."):
        raise SparseError(f"{path} is wrapped by an adapter; merge it into the model first (merge_and_unload)")
    if not isinstance(module, SparseModule) and sparse_class(module) is None:
        raise SparseError(f"{path} is a {type(module).__name__}, which cannot train in parts; dequantize it first")


def _check_weight(model: nn.Module, slices: Slices, shared: dict[int, list[str]]) -> None:
    name = slices.part.parameter
    parameter = model.get_parameter(name)
    if is_sharded(parameter):
        raise SparseError(f"{name} is sharded (FSDP, ZeRO-3 or tensor parallel); load the model whole, {DDP}")
    if parameter.device.type == "meta":
        raise SparseError(f"{name} is on the meta device; load the weights first")
    if parameter.dtype not in DTYPES:
        raise SparseError(f"{name} is {parameter.dtype}; load the model in float32, bfloat16 or float16")
    if not parameter.is_contiguous():
        raise SparseError(f"{name} is not contiguous; set it to its contiguous()")
    if others := [other for other in shared[parameter.data_ptr()] if other != name]:
        raise SparseError(f"{name} is tied to {', '.join(others)}; untie it")
    weight = parameter.detach() if slices.part.expert_index is None else parameter.detach()[slices.part.expert_index]
    index = slices.index.to(weight.device)
    if int(index[-1]) >= weight.shape[slices.part.dim] or int(index[0]) < 0:
        raise SparseError(
            f"{name} has {weight.shape[slices.part.dim]} slices along dimension {slices.part.dim}, a selected unit "
            f"owns {int(index[-1])}; localize on this model"
        )
    if not bool(weight.index_select(slices.part.dim, index).isfinite().all()):
        raise NonFiniteError(f"{name} holds NaN or infinite values; load the model again")
    module = model.get_submodule(name.rpartition(".")[0])
    cls = sparse_class(module)
    if cls is not None and issubclass(cls, SparseProjection) and not is_linear(module):
        raise SparseError(
            f"{name} is that of a {type(module).__name__}, which does more than multiply by it; merge or dequantize it"
        )


def _turn_sparse(model: nn.Module, slices: Slices, reach: Reach, indices: dict[int, Tensor]) -> TrainedPart:
    path, _, name = slices.part.parameter.rpartition(".")
    module = model.get_submodule(path)
    if not isinstance(module, SparseModule):
        cls = sparse_class(module)
        assert cls is not None
        module.__class__ = cls
        module.trained_parts = []  # type: ignore[assignment]
    assert isinstance(module, SparseModule)
    part = TrainedPart(
        module=module,
        name=name,
        path=slices.part.parameter,
        lead=slices.part.expert_index,
        dim=slices.part.dim,
        output_dim=output_dim(module),
        index=indices.setdefault(id(slices.index), slices.index.to(getattr(module, name).device)),
        category=slices.category,
        selected=nn.Parameter(torch.empty(0, device="cpu")),
        original=torch.empty(0, device="cpu"),
        layer=slices.layer,
        layers=slices.layers,
        reach=reach,
    )
    part.original = part.read()
    part.selected = nn.Parameter(part.original.to(torch.float32, copy=True))
    module.register_parameter(part.master_name, part.selected)
    module.trained_parts.append(part)
    return part


def _turn_back(module: nn.Module) -> None:
    assert isinstance(module, SparseModule)
    for part in module.trained_parts:
        delattr(module, part.master_name)
    del module.trained_parts
    before = original_class(module)
    module.__class__ = before  # type: ignore[assignment]
