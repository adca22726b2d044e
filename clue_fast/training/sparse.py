"""Makes a model train its selected units only, without changing what it computes or how it is saved.

The rows (gate and up) or columns (down) of the selected units get a float32 copy, the master values: the only
parameters that train. The forward reads the full weights, as ever; the backward fills the gradient of the
masters alone; the optimizer writes them back into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.errors import NonFiniteError, SparseError
from clue_fast.selection import Selection

ROWS, COLUMNS = 0, 1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseLinear(nn.Linear):
    """An ``nn.Linear`` of which only some rows or columns train.

    Never built, only turned into: ``sparsify`` changes the class of the layers of one model, so that no
    library class is modified and every other property of the layer stays.

    Attributes:
        selected: master values of the trained part, float32, [k, in_features] (dim 0) or [out_features, k]
            (dim 1).
        index: the rows or columns they belong to, int64 [k], sorted.
        dim: 0 for rows, 1 for columns.
        original: the trained part as it was before training, in the dtype of the weight.
        path: path of this module in the model.
        layer, layers: index of its transformer layer, and how many layers there are.
        swapped: whether the weight holds the original values at the moment, see ``Sparse.original``.
    """

    selected: nn.Parameter
    index: Tensor
    dim: int
    original: Tensor
    path: str
    layer: int
    layers: int
    swapped: bool

    def forward(self, input: Tensor) -> Tensor:
        """Exactly ``F.linear(input, self.weight, self.bias)``; the gradient goes to ``selected``."""
        return ops.sparse_linear(input, self.weight, self.bias, self.selected, self.index, self.dim)

    @torch.no_grad()
    def read_weight(self) -> None:
        """Refreshes the master values from the weight."""
        self.selected.copy_(self.weight.index_select(self.dim, self.index))

    @torch.no_grad()
    def write_weight(self, values: Tensor) -> None:
        """Writes values of the trained part into the weight, rounded to nearest even."""
        self.weight.index_copy_(self.dim, self.index, values.to(self.weight.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        master = self.selected.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # `.to(bfloat16)` casts every parameter; the masters exist to keep what bfloat16 would drop.
        if self.selected.dtype != torch.float32:
            self.selected.data = master.to(self.weight.device)
            self.selected.grad = None
        self.index = self.index.to(self.weight.device)
        self.original = self.original.to(self.weight)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}selected", None)

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
        if f"{prefix}selected" in missing_keys:
            missing_keys.remove(f"{prefix}selected")
        if f"{prefix}weight" in state_dict:
            self.read_weight()

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of this layer."""
        part = f"{len(self.index)} of {self.weight.shape[self.dim]} {('rows', 'columns')[self.dim]}"
        return f"{super().extra_repr()}, trained: {part}"


class Sparse:
    """A model of which only the selected weights train; made by ``sparsify``.

    Also a context manager that restores the model at its end.

    Attributes:
        model: the model, changed in place.
        selection: what trains in it.
        modules: path -> SparseLinear, in the order of the sites.
    """

    def __init__(self, model: nn.Module, selection: Selection, modules: dict[str, SparseLinear]) -> None:
        self.model = model
        self.selection = selection
        self.modules = modules
        masters = {id(module.selected) for module in modules.values()}
        self._flags = [(p, p.requires_grad) for p in model.parameters() if id(p) not in masters]
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
            parameter.grad = None

    @property
    def trainable_parameters(self) -> list[nn.Parameter]:
        """The master values of every module, float32."""
        return [module.selected for module in self.modules.values()]

    def restore(self) -> None:
        """Puts classes and ``requires_grad`` flags back to what they were; trained weights stay."""
        for module in self.modules.values():
            _turn_back(module)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        self.modules, self._flags = {}, []

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """The model as it was before training, for as long as the context lasts.

        Swaps the original selected values into the weights and afterwards the current ones back, bit for bit.
        Gradients are off inside. A forward pass from before it can no longer be run backward, which raises:
        the weights that it remembers have been written to.

        Raises:
            SparseError: inside another such context.
        """
        if any(module.swapped for module in self.modules.values()):
            raise SparseError("the model holds its original weights already; do not nest Sparse.original()")
        with torch.no_grad():
            current = {}
            try:
                for path, module in self.modules.items():
                    current[path] = module.weight.index_select(module.dim, module.index)
                    module.swapped = True
                    module.write_weight(module.original)
                yield self.model
            finally:
                for path, values in current.items():
                    self.modules[path].write_weight(values)
                    self.modules[path].swapped = False

    def revert(self) -> None:
        """Puts the original values back for good, into weights and masters; optimizer state is left alone."""
        for module in self.modules.values():
            module.write_weight(module.original)
            module.read_weight()

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
            "trainable": sum(p.nbytes for p in self.trainable_parameters),
            "original": sum(module.original.nbytes for module in self.modules.values()),
            "gradients": sum(p.grad.nbytes for p in parameters if p.grad is not None),
            "optimizer_state": sum(t.nbytes for t in state if isinstance(t, Tensor)),
        }

    def __repr__(self) -> str:
        trained = sum(p.numel() for p in self.trainable_parameters)
        total = sum(p.numel() for p in self.model.parameters()) - trained
        return (
            f"Sparse({len(self.selection)} units in {len(self.modules)} modules: "
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
    if any(isinstance(module, SparseLinear) for module in model.modules()):
        raise SparseError("the model is sparse already; call restore() of the Sparse that made it so")
    selection.check(model)
    plan = [(_module_path(name, lead), dim, index) for (name, dim, lead), index in selection.slices().items()]
    shared = _shared_weights(model)
    for path, dim, index in plan:
        _check(path, model.get_submodule(path), dim, index, shared)
    layer_of = {part.parameter: site.layer for site in selection.sites for part in site.parts}
    layers = 1 + max(layer_of.values())
    modules = {
        path: _turn_sparse(model, path, dim, index, layer_of[f"{path}.weight"], layers) for path, dim, index in plan
    }
    return Sparse(model, selection, modules)


def _module_path(parameter: str, lead: int | None) -> str:
    path, _, name = parameter.rpartition(".")
    if lead is not None or name != "weight":
        raise SparseError(f"{parameter} is no weight of a linear layer; only rows and columns of those train in parts")
    return path


def _shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of all parameters by the address of their data."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), []).append(name)
    return names


def _check(path: str, module: nn.Module, dim: int, index: Tensor, shared: dict[int, list[str]]) -> None:
    # A subclass may compute anything in its forward: adapters, quantized products.
    if type(module) is not nn.Linear:
        kind = type(module).__name__
        raise SparseError(f"{path} is a {kind}, not a plain nn.Linear; merge adapters or dequantize first")
    weight = module.weight
    if weight.device.type == "meta":
        raise SparseError(f"{path}.weight is on the meta device; load the weights first")
    if weight.dtype not in DTYPES:
        raise SparseError(f"{path}.weight is {weight.dtype}; load the model in float32, bfloat16 or float16")
    if not weight.is_contiguous():
        raise SparseError(f"{path}.weight is not contiguous; set it to weight.contiguous()")
    if others := [name for name in shared[weight.data_ptr()] if name != f"{path}.weight"]:
        raise SparseError(f"{path}.weight is tied to {', '.join(others)}; untie it")
    if not bool(weight.detach().index_select(dim, index.to(weight.device)).isfinite().all()):
        raise NonFiniteError(f"{path}.weight holds NaN or infinite values; load the model again")


def _turn_sparse(model: nn.Module, path: str, dim: int, index: Tensor, layer: int, layers: int) -> SparseLinear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    index = index.to(module.weight.device)
    original = module.weight.detach().index_select(dim, index)
    module.__class__ = SparseLinear
    assert isinstance(module, SparseLinear)
    module.index, module.dim, module.original, module.swapped = index, dim, original, False
    module.path, module.layer, module.layers = path, layer, layers
    module.register_parameter("selected", nn.Parameter(original.to(torch.float32, copy=True)))
    return module


def _turn_back(module: SparseLinear) -> None:
    for name in ("selected", "index", "dim", "original", "swapped", "path", "layer", "layers"):
        delattr(module, name)
    module.__class__ = nn.Linear  # type: ignore[assignment]
