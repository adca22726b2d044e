"""Layers of which only some slices of the parameters train, and which class a layer gets for that.

``inject`` changes the class of a layer of one model to a subclass of its own, so that no library class is modified and
every other property of the layer stays; ``restore`` undoes it. A sparse layer holds its ``TrainableSlice``s, and keeps
their values with it when it moves, and out of its state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast import ops
from clue_fast.errors import SparseError
from clue_fast.internals import CHECKPOINT_FUNCTION, ModuleEvents, expert_gate, has_no_data, is_expert_parallel
from clue_fast.sites import mixed_class
from clue_fast.sites.experts import Stack, find_stack
from clue_fast.sites.projection import projection_of
from clue_fast.sparse.slices import ForwardPass, TrainableSlice, add_slice_grad, training_rows


class SparseModule(ModuleEvents):
    """What all sparse modules share; comes before the class of the layer.

    Values of slices are parameters of the module, so that they move, train and are found with it, but they are in no
    state dict: checkpoints stay plain.

    Attributes:
        trainable_slices: what trains in this module.
    """

    trainable_slices: list[TrainableSlice]

    def around_move(self, move: Callable[[], Any]) -> None:
        """Has the values follow the weights, in their own precision."""
        before = [(trained.values.detach(), trained.own_master()) for trained in self.trainable_slices]
        move()
        for trained, (values, own_master) in zip(self.trainable_slices, before, strict=True):
            trained.follow_weight(values, own_master)

    def after_save(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Leaves the values out."""
        for trained in self.trainable_slices:
            state_dict.pop(prefix + trained.values_name, None)

    def after_load(self, state_dict: dict[str, Any], prefix: str, missing_keys: list[str]) -> None:
        """Takes the values from the weights that were loaded."""
        for trained in self.trainable_slices:
            if prefix + trained.values_name in missing_keys:
                missing_keys.remove(prefix + trained.values_name)
            if prefix + trained.name in state_dict:
                trained.refresh(trained.read())

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        trained = (
            f"{len(one.index)} of {one.width} along {one.dim} of {one.name} ({one.category})"
            for one in self.trainable_slices
        )
        return ", ".join(filter(None, (super().extra_repr(), f"trained: {'; '.join(trained)}")))


class SparseLinear(SparseModule, nn.Linear):
    """An ``nn.Linear`` of which only some rows, columns and biases train."""

    def forward(self, input: Tensor) -> Tensor:
        """Exactly ``F.linear(input, self.weight, self.bias)``; the gradient goes to the trained slices."""
        weight, bias = self._always_trained()
        if weight is None:
            out = super().forward(input)
        else:
            bias_values = None if bias is None else bias.leaf
            trained = (weight.leaf, weight.index, weight.dim)
            out = ops.sparse_linear(input, self.weight, self.bias, *trained, bias_values=bias_values)
        for other in self.trainable_slices:
            if other is not weight and other is not bias:
                out = add_slice_grad(out, input, other)
        return out

    def _always_trained(self) -> tuple[TrainableSlice | None, TrainableSlice | None]:
        """What all records train, which the operator takes: slices of the weight, and of the bias to its rows."""
        conflict = {trained.name: trained for trained in self.trainable_slices if trained.category == "conflict"}
        weight, bias = conflict.get("weight"), conflict.get("bias")
        same = weight is not None and bias is not None and weight.dim == 0 and weight.index is bias.index
        return weight, bias if same else None


class SparseProjection(SparseModule):
    """Any other layer that multiplies by its weight, such as a Conv1D."""

    def forward(self, x: Tensor) -> Tensor:
        """Exactly what the layer computes; the gradient goes to the trained slices."""
        out: Tensor = super().forward(x)
        for trained in self.trainable_slices:
            out = add_slice_grad(out, x, trained)
        return out


Rows: TypeAlias = "slice | Tensor"


class SparseExperts(SparseModule):
    """Experts stacked in three-dimensional parameters.

    Without gradients their own forward. With gradients expert by expert, as transformers defines them, since the
    faster implementations give a gradient of all weights of all experts or none.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the weighted sum of the chosen experts, [tokens, width of the model]."""
        if not torch.is_grad_enabled():
            y: Tensor = super().forward(*args, **kwargs)
            return y
        if is_expert_parallel(self):
            raise SparseError(
                f"{self.trainable_slices[0].path} is split over devices by expert; train without expert parallelism"
            )
        return self._by_expert(*args, *kwargs.values())

    def _by_expert(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden is [tokens, width], chosen and weights [tokens, experts a token]."""
        stack = find_stack(self)
        assert stack is not None
        ends = {trained.category: training_rows(hidden, trained) for trained in self.trainable_slices}
        out = torch.zeros_like(hidden)
        for expert, place, token in _tokens_by_expert(chosen, stack.experts):
            rows = {category: _first(token, end, len(hidden)) for category, end in ends.items()}
            z = self._linear(hidden[token], stack, "gate_up", expert, rows)
            gate = expert_gate(self)
            assert gate is not None
            y = self._linear(gate(z), stack, "down", expert, rows)
            out.index_add_(0, token, (y * weights[token, place, None]).to(out.dtype))
        return out

    def _linear(self, x: Tensor, stack: Stack, layer: str, expert: int, rows: dict[str, Rows]) -> Tensor:
        weight_name, bias_name = getattr(stack, layer), getattr(stack, f"{layer}_bias")
        weight: Tensor = getattr(self, weight_name)[expert]
        y = x @ weight if stack.transposed else functional.linear(x, weight)
        if bias_name is not None:
            y = y + getattr(self, bias_name)[expert]
        for trained in self.trainable_slices:
            if trained.expert_index == expert and trained.name in (weight_name, bias_name):
                y = add_slice_grad(y, x, trained, rows[trained.category])
        return y


def _tokens_by_expert(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields the experts that are chosen, and of each the tokens that chose it, and as which of their choices.

    Where there are no data, every expert has as many of them.
    """
    if has_no_data(chosen):
        for expert in range(min(experts, chosen.numel())):
            tokens = chosen.new_empty((chosen.numel() + experts - 1 - expert) // experts)
            yield expert, tokens, tokens
        return
    with torch.no_grad():
        used = torch.bincount(chosen.flatten(), minlength=experts)[:experts].nonzero().flatten()
    for expert in used.tolist():
        yield expert, *torch.where(chosen.t() == expert)


def _first(token: Tensor, end: int, tokens: int) -> Rows:
    """Places of the tokens before ``end``."""
    return slice(None) if end == tokens else (token < end).nonzero().flatten()


def sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """Returns the sparse class of a layer, a subclass of the layer's own, or None if there is none."""
    if type(module) is nn.Linear:
        return SparseLinear
    if projection_of(module, "") is not None:
        return mixed_class(SparseProjection, type(module), f"Sparse{type(module).__name__}")
    if find_stack(module) is not None and expert_gate(module) is not None:
        return mixed_class(SparseExperts, type(module), f"Sparse{type(module).__name__}")
    return None


def inject(model: nn.Module, planned: Iterable[TrainableSlice]) -> None:
    """Gives slices that are planned to the layers of a model, which turn sparse, whatever their weights hold.

    Raises:
        SparseError: a layer cannot train in parts; then none has turned sparse.
    """
    planned = list(planned)
    for one in planned:
        check_layer(model, one)
    forward_pass = ForwardPass()
    for one in planned:
        module = model.get_submodule(one.module_path)
        if not isinstance(module, SparseModule):
            cls = sparse_class(module)
            assert cls is not None
            module.__class__ = cls
            module.trainable_slices = []  # type: ignore[assignment]
        assert isinstance(module, SparseModule)
        one.bind(module, output_dim(module), forward_pass)
        module.register_parameter(one.values_name, one.values)
        module.trainable_slices.append(one)


def restore(module: SparseModule) -> None:
    """Gives a layer its own class back; what has been trained stays in its weights."""
    for trained in module.trainable_slices:
        delattr(module, trained.values_name)
    del module.trainable_slices
    before = original_class(module)
    module.__class__ = before  # type: ignore[assignment]


def check_layer(model: nn.Module, planned: TrainableSlice) -> None:
    """Raises SparseError unless slices of this layer can train."""
    path = planned.module_path
    module = model.get_submodule(path)
    if "base_layer" in path.split("."):
        raise SparseError(f"{path} is wrapped by an adapter; merge it into the model first (merge_and_unload)")
    if not isinstance(module, SparseModule) and sparse_class(module) is None:
        raise SparseError(f"{path} is a {type(module).__name__}, which cannot train in parts; dequantize it first")


def original_class(module: SparseModule) -> type[nn.Module]:
    """Returns the class that a sparse module had before."""
    order = type(module).__mro__
    found: type[nn.Module] = order[order.index(ModuleEvents) + 1]
    return found


def output_dim(module: nn.Module) -> int:
    """Returns the dimension of a layer's weight that counts its outputs, behind that of the experts if it has them."""
    projection, stack = projection_of(module, ""), find_stack(module)
    if projection is not None:
        return projection.output_dim
    return int(stack is not None and stack.transposed)


def limit_checkpointing(model: nn.Module, trained: Iterable[TrainableSlice]) -> None:
    """Lets checkpointing, where it is on, run a backward through the layers that train and those above only.

    transformers makes the embeddings need a gradient as soon as checkpointing is on, since reentrant checkpointing
    drops the gradients of a layer whose input needs none. Then a backward runs through every layer. Here only the
    layers that train get such an input.
    """
    disable = getattr(model, "disable_input_require_grads", None)
    if callable(disable):
        disable()
    paths = [one.path for one in trained]
    for path, module in model.named_modules():
        checkpoint: Any = getattr(module, CHECKPOINT_FUNCTION, None)
        if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            trains = any(name.startswith(f"{path}.") for name in paths)
            setattr(module, CHECKPOINT_FUNCTION, _Limited(checkpoint, trains))


class _Limited:
    """A reentrant checkpoint function: gives a layer that trains an input with a gradient, and skips those below."""

    def __init__(self, checkpoint: Callable[..., Any], trains: bool) -> None:
        self.checkpoint = checkpoint
        self.trains = trains

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
            if not self.trains:
                return function(*given)
            place = next(i for i, v in enumerate(given) if isinstance(v, Tensor) and v.is_floating_point())
            given[place] = given[place].detach().requires_grad_()
        return self.checkpoint(function, *given, **kwargs)
