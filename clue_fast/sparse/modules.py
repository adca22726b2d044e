"""Gradient checkpointing of a sparse model, with no backward below the lowest selected layer.

transformers makes the embeddings need a gradient as soon as checkpointing is on, since reentrant checkpointing drops
the gradients of a layer whose input needs none. Then a backward runs through every layer. Here only the layers that
train get such an input.

Sparse modules: layers of which only some slices of the parameters train.

None is ever built: ``sparsify`` changes the class of layers of one model to a subclass made here, so that no library
class is modified, and every other property of the layer stays.

Stacked experts of which only some channels train.

Which sparse class a layer gets, and whether the layer computes what that class takes for granted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast import ops
from clue_fast.errors import SparseError
from clue_fast.sites.experts import Stack, find_stack
from clue_fast.sites.projection import projection_of
from clue_fast.sparse.slices import TrainedPart, graft


def limit_checkpointing(model: nn.Module, parts: Iterable[TrainedPart]) -> None:
    """Lets checkpointing, where it is on, run a backward through the layers that train and those above only."""
    disable = getattr(model, "disable_input_require_grads", None)
    if callable(disable):
        disable()
    paths = [part.path for part in parts]
    for path, module in model.named_modules():
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            trains = any(name.startswith(f"{path}.") for name in paths)
            setattr(module, "_gradient_checkpointing_func", _Limited(checkpoint, trains))  # noqa: B010


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


if TYPE_CHECKING:
    _Base = nn.Module
else:
    _Base = object


class SparseModule(_Base):
    """What all sparse modules share; comes before the class of the layer.

    Master values are parameters of the module, so that they move, train and are found with it, but they are in no
    state dict: checkpoints stay plain.

    Attributes:
        trained_parts: what trains in this module.
    """

    trained_parts: list[TrainedPart]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        masters = [part.selected.detach() for part in self.trained_parts]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved: dict[int, Tensor] = {}  # parts that share an index still do
        for part, master in zip(self.trained_parts, masters, strict=True):
            # `.to(bfloat16)` casts every parameter; the masters exist to keep what bfloat16 would drop.
            if part.selected.dtype != torch.float32 or not part.has_master:
                part.selected.data = master.to(part.weight.device)
                part.selected.grad = None
            part.index = moved.setdefault(id(part.index), part.index.to(part.weight.device))
            part.original = part.original.to(part.weight)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for part in self.trained_parts:
            destination.pop(prefix + part.master_name, None)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for part in self.trained_parts:
            if prefix + part.master_name in missing_keys:
                missing_keys.remove(prefix + part.master_name)
            if prefix + part.name in state_dict:
                part.set_master(part.read())

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        parts = (
            f"{len(p.index)} of {p.weight.shape[p.dim]} along {p.dim} of {p.name} ({p.category})"
            for p in self.trained_parts
        )
        return ", ".join(filter(None, (super().extra_repr(), f"trained: {'; '.join(parts)}")))


class SparseLinear(SparseModule, nn.Linear):
    """An ``nn.Linear`` of which only some rows, columns and biases train."""

    def forward(self, input: Tensor) -> Tensor:
        """Exactly ``F.linear(input, self.weight, self.bias)``; the gradient goes to the trained parts."""
        weight, bias = self._always_trained()
        if weight is None:
            out = super().forward(input)
        else:
            selected_bias = None if bias is None else bias.selected
            slices = (weight.selected, weight.index, weight.dim)
            out = ops.sparse_linear(input, self.weight, self.bias, *slices, selected_bias=selected_bias)
        for part in self.trained_parts:
            if part is not weight and part is not bias:
                out = graft(out, input, part)
        return out

    def _always_trained(self) -> tuple[TrainedPart | None, TrainedPart | None]:
        """The parts that all records train, which the operator takes: of the weight, and of the bias to its rows."""
        conflict = {part.name: part for part in self.trained_parts if part.category == "conflict"}
        weight, bias = conflict.get("weight"), conflict.get("bias")
        same = weight is not None and bias is not None and weight.dim == 0 and weight.index is bias.index
        return weight, bias if same else None


class SparseProjection(SparseModule):
    """Any other layer that multiplies by its weight, such as a Conv1D: its own forward, with gradients grafted on."""

    def forward(self, x: Tensor) -> Tensor:
        """Exactly what the layer computes; the gradient goes to the trained parts."""
        out: Tensor = super().forward(x)
        for part in self.trained_parts:
            out = graft(out, x, part)
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
        if getattr(self, "_is_expert_parallel", False):
            raise SparseError(
                f"{self.trained_parts[0].path} is split over devices by expert; train without expert parallelism"
            )
        return self._by_expert(*args, *kwargs.values())

    def _by_expert(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Hidden is [tokens, width], chosen and weights [tokens, experts a token]."""
        stack = find_stack(self)
        assert stack is not None
        reached = {part.category: _reached(part, hidden) for part in self.trained_parts}
        out = torch.zeros_like(hidden)
        with torch.no_grad():
            used = torch.bincount(chosen.flatten(), minlength=stack.experts)[: stack.experts].nonzero().flatten()
        for expert in used.tolist():
            place, token = torch.where(chosen.t() == expert)
            rows = {category: _first(token, end, len(hidden)) for category, end in reached.items()}
            z = self._linear(hidden[token], stack, "gate_up", expert, rows)
            gate: Callable[[Tensor], Tensor] = getattr(self, "_apply_gate")  # noqa: B009
            y = self._linear(gate(z), stack, "down", expert, rows)
            out.index_add_(0, token, (y * weights[token, place, None]).to(out.dtype))
        return out

    def _linear(self, x: Tensor, stack: Stack, layer: str, expert: int, rows: dict[str, Rows]) -> Tensor:
        weight_name, bias_name = getattr(stack, layer), getattr(stack, f"{layer}_bias")
        weight: Tensor = getattr(self, weight_name)[expert]
        y = x @ weight if stack.transposed else functional.linear(x, weight)
        if bias_name is not None:
            y = y + getattr(self, bias_name)[expert]
        for part in self.trained_parts:
            if part.lead == expert and part.name in (weight_name, bias_name):
                y = graft(y, x, part, rows[part.category])
        return y


def _first(token: Tensor, end: int, tokens: int) -> Rows:
    """Places of the tokens before ``end``."""
    return slice(None) if end == tokens else (token < end).nonzero().flatten()


def _reached(part: TrainedPart, hidden: Tensor) -> int:
    """How many leading tokens train a part."""
    return part.reach.rows(hidden, part.path) if part.category == "forget" else len(hidden)


def sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """Returns the sparse class of a layer, a subclass of the layer's own, or None if there is none."""
    if type(module) is nn.Linear:
        return SparseLinear
    if projection_of(module, "") is not None:
        return _mixed(SparseProjection, type(module))
    if find_stack(module) is not None and callable(getattr(module, "_apply_gate", None)):
        return _mixed(SparseExperts, type(module))
    return None


def original_class(module: SparseModule) -> type[nn.Module]:
    """Returns the class that a sparse module had before."""
    order = type(module).__mro__
    found: type[nn.Module] = order[order.index(SparseModule) + 1]
    return found


def _mixed(mixin: type[SparseModule], original: type[nn.Module]) -> type[SparseModule]:
    if (mixin, original) not in _classes:
        name = f"Sparse{original.__name__}"
        _classes[mixin, original] = type(
            name, (mixin, original), {"__doc__": f"{original.__name__}, some of which trains."}
        )
    return _classes[mixin, original]


_classes: dict[tuple[type[SparseModule], type[nn.Module]], type[SparseModule]] = {}


def output_dim(module: nn.Module) -> int:
    """Returns the dimension of a layer's weight that counts its outputs, behind that of the experts if it has them."""
    projection, stack = projection_of(module, ""), find_stack(module)
    if projection is not None:
        return projection.output_dim
    return int(stack is not None and stack.transposed)


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether a projection multiplies its input by its weight and adds its bias, found by running it.

    Compared on at most 64 of its outputs, so that no copy of a large weight is made.
    """
    projection = projection_of(module, "")
    assert projection is not None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    x = torch.randn(3, projection.inputs, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    chosen = torch.arange(0, projection.outputs, -(-projection.outputs // 64), device=weight.device)
    matrix = weight.index_select(projection.output_dim, chosen).double()
    expected = x.double() @ (matrix.t() if projection.output_dim == 0 else matrix)
    expected += 0.0 if bias is None else bias[chosen].double()
    found = type(module).forward(module, x)
    if found.shape != (len(x), projection.outputs):
        return False
    # A product of n terms in 16 bits is off by a few units in the last place of its norm; another function is not.
    return bool((found[:, chosen].double() - expected).norm() < 0.05 * expected.norm())
