"""Sparse modules: layers of which only some slices of the parameters train.

None is ever built: ``sparsify`` changes the class of layers of one model to a subclass made here, so that no library
class is modified, and every other property of the layer stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.training.graft import graft
from clue_fast.training.parts import TrainedPart

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
        for part, master in zip(self.trained_parts, masters, strict=True):
            # `.to(bfloat16)` casts every parameter; the masters exist to keep what bfloat16 would drop.
            if part.selected.dtype != torch.float32 or not part.has_master:
                part.selected.data = master.to(part.weight.device)
                part.selected.grad = None
            part.index = part.index.to(part.weight.device)
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
        direct = next((p for p in self.trained_parts if p.name == "weight" and p.category == "conflict"), None)
        if direct is None:
            out = super().forward(input)
        else:
            out = ops.sparse_linear(input, self.weight, self.bias, direct.selected, direct.index, direct.dim)
        for part in self.trained_parts:
            if part is not direct:
                out = graft(out, input, part)
        return out


class SparseProjection(SparseModule):
    """Any other layer that multiplies by its weight, such as a Conv1D: its own forward, with gradients grafted on."""

    def forward(self, x: Tensor) -> Tensor:
        """Exactly what the layer computes; the gradient goes to the trained parts."""
        out: Tensor = super().forward(x)
        for part in self.trained_parts:
            out = graft(out, x, part)
        return out
