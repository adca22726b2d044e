"""The forward that replaces that of a gated MLP, through the fused operator.

A patched module keeps its children, its state and its place; only its class is swapped for a subclass of it with
another forward. Classes of libraries are never modified.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.patching.recorder import Point

STATE = "_clue_fast"
_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class GatedState:
    """What a fused gated MLP knows.

    Attributes:
        point: where it records.
        activation: between gate and up.
        inputs: names of its projections: gate and up, or the one that packs them.
        slices: of the packed projection's outputs, those that are gate, and those that are up.
        down: name of its last projection.
        dropout: name of the dropout layer before that, or None.
        multipliers: what the gate, and what the last projection gives, is multiplied by.
    """

    point: Point
    activation: str
    inputs: tuple[str, ...]
    slices: tuple[slice, slice] | None
    down: str
    dropout: str | None
    multipliers: tuple[float, float] = (1.0, 1.0)


class FusedGatedMLP(nn.Module):
    """Mixed into the class of a gated MLP: down(act(gate(x)) · up(x)) through ``ops.gated_activation``."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns what the module's own forward does, [..., width of the model]."""
        state: GatedState = getattr(self, STATE)
        recorder = state.point.recorder
        if state.slices is None:
            gate, up = (getattr(self, name)(x) for name in state.inputs)
        else:
            packed = getattr(self, state.inputs[0])(x)
            gate, up = (packed[..., part] for part in state.slices)
        of_gate, of_output = state.multipliers
        gate = gate if of_gate == 1.0 else gate * of_gate
        dropout = None if state.dropout is None else getattr(self, state.dropout)
        if dropout is not None and dropout.training and dropout.p > 0.0:
            # What counts is what the last projection sees, so the statistics wait for the dropout.
            h = dropout(ops.gated_activation(gate, up, state.activation, backend=recorder.backend))
            h = recorder.observe(state.point, h) if recorder.recording else h
        else:
            h = recorder.gated_activation(state.point, gate, up, state.activation)
        down = getattr(self, state.down)
        y = apply_in_its_dtype(down, h)
        return y if of_output == 1.0 else y * of_output


def apply_in_its_dtype(projection: nn.Module, h: Tensor) -> Tensor:
    """Applies a projection whose weight may be kept in another precision than the rest, as T5 does."""
    dtype = getattr(getattr(projection, "weight", None), "dtype", h.dtype)
    if dtype != h.dtype and dtype in _PLAIN_DTYPES and not torch.is_autocast_enabled(h.device.type):
        h = h.to(dtype)
    y: Tensor = projection(h)
    return y
