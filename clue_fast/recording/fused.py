"""The forwards that take the place of a module's own: a gated MLP through the fused operator, stacked experts recorded.

A patched module keeps its children, its state and its place; only its class is swapped for a subclass of it with
another forward. Classes of libraries are never modified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.errors import PatchError
from clue_fast.internals import expert_gate, is_expert_parallel, own_parameters
from clue_fast.ops.expert_linear import expert_linear
from clue_fast.recording.recorder import Point, refuse_distributed
from clue_fast.sites.experts import Stack

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


@dataclass(eq=False)
class ExpertsState:
    """What a recorded stack of experts knows.

    Attributes:
        point: where it records.
        stack: names and layout of its parameters.
        activation: of the fused operator, or None to call the module's own gate.
        slices: of the packed rows, those that are gate, and those that are up.
    """

    point: Point
    stack: Stack
    activation: str | None
    slices: tuple[slice, slice]


@dataclass(frozen=True)
class _Sorted:
    """Tokens sorted by the expert that they are sent to, one row for each expert of a token.

    Attributes:
        order: [rows], the place of each among the choices of all tokens, flattened.
        expert: [rows] int64, ascending.
        token: [rows] int64.
        bounds: [experts + 1] int64, where the rows of each expert begin.
    """

    order: Tensor
    expert: Tensor
    token: Tensor
    bounds: Tensor


class RecordedExperts(nn.Module):
    """Mixed into the class of stacked experts: its own forward, unless it is recorded."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the weighted sum of the chosen experts, [tokens, width of the model]."""
        state: ExpertsState = getattr(self, STATE)
        point = state.point
        if not point.recorder.recording:
            y: Tensor = super().forward(*args, **kwargs)
            return y
        if is_expert_parallel(self):
            raise PatchError(f"{point.site.path} is split over devices by expert; record without expert parallelism")
        hidden, chosen, weights = (*args, *kwargs.values())
        refuse_distributed(point.site, hidden)
        group = point.recorder.groups_at(point, hidden).group
        if torch.is_grad_enabled() and len(own_parameters(self)) > len(state.stack.names):
            # Parts of the experts train, through a forward of their own, which does not show its activations.
            if point.recorder.gradients:
                raise PatchError(f"{point.site.path} trains in parts; record its gradients before it does, or after")
            with torch.no_grad():
                self._activations(hidden, _sort(chosen, state.stack.experts), group)
            y = super().forward(*args, **kwargs)
            return y
        return self.by_expert(hidden, chosen, weights, group)

    def by_expert(self, hidden: Tensor, chosen: Tensor, weights: Tensor, group: Tensor | None) -> Tensor:
        """Returns the weighted sum of the chosen experts, computed expert by expert.

        Args:
            hidden: [tokens, width of the model].
            chosen: [tokens, experts a token] int64.
            weights: of the chosen experts, in the shape of chosen.
            group: of the tokens, [tokens] int8, to record them, or None.
        """
        state: ExpertsState = getattr(self, STATE)
        stack, rows = state.stack, _sort(chosen, state.stack.experts)
        h = self._activations(hidden, rows, group)
        y = expert_linear(h, getattr(self, stack.down), rows.bounds, stack.transposed)
        y = y if stack.down_bias is None else y + getattr(self, stack.down_bias)[rows.expert]
        y = y * weights.flatten()[rows.order][:, None]
        back = torch.empty_like(rows.order)
        back.scatter_(0, rows.order, torch.arange(len(back), device=back.device))
        return y[back].reshape(len(hidden), chosen.shape[-1], -1).sum(1).to(hidden.dtype)

    def _activations(self, hidden: Tensor, rows: _Sorted, group: Tensor | None) -> Tensor:
        """What the experts' down projections read, [rows, width], recorded if the tokens have groups."""
        state: ExpertsState = getattr(self, STATE)
        recorder, stack = state.point.recorder, state.stack
        z = expert_linear(hidden[rows.token], getattr(self, stack.gate_up), rows.bounds, stack.transposed)
        z = z if stack.gate_up_bias is None else z + getattr(self, stack.gate_up_bias)[rows.expert]
        if state.activation is None:
            gate_function = expert_gate(self)
            assert gate_function is not None
            h = gate_function(z)
        else:
            gate, up = (z[..., part] for part in state.slices)
            h = ops.gated_activation(gate, up, state.activation, backend=recorder.backend)
        if group is not None:
            h = recorder.observe_experts(state.point, h, group[rows.token], rows.expert, rows.bounds)
        return h


def _sort(chosen: Tensor, experts: int) -> _Sorted:
    expert, order = torch.sort(chosen.flatten(), stable=True)
    bounds = torch.searchsorted(expert, torch.arange(experts + 1, device=expert.device))
    return _Sorted(order, expert, order // chosen.shape[-1], bounds)
