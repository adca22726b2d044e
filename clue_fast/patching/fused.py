"""Forwards that replace those of patched modules: gated MLPs and stacked experts through the fused operator.

A patched module keeps its children, its state and its place; only its class is swapped for a subclass of it with
another forward. Classes of libraries are never modified.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.errors import PatchError
from clue_fast.patching.recorder import Point, refuse_distributed
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
    """

    point: Point
    activation: str
    inputs: tuple[str, ...]
    slices: tuple[slice, slice] | None
    down: str
    dropout: str | None


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
        dropout = None if state.dropout is None else getattr(self, state.dropout)
        if dropout is not None and dropout.training and dropout.p > 0.0:
            # What counts is what the last projection sees, so the statistics wait for the dropout.
            h = dropout(ops.gated_activation(gate, up, state.activation, backend=recorder.backend))
            h = recorder.observe(state.point, h) if recorder.recording else h
        else:
            h = recorder.gated_activation(state.point, gate, up, state.activation)
        down = getattr(self, state.down)
        return apply_in_its_dtype(down, h)


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


class RecordedExperts(nn.Module):
    """Mixed into the class of stacked experts: its own forward, unless it is recorded."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the weighted sum of the chosen experts, [tokens, width of the model]."""
        state: ExpertsState = getattr(self, STATE)
        point = state.point
        if not point.recorder.recording:
            y: Tensor = super().forward(*args, **kwargs)
            return y
        if getattr(self, "_is_expert_parallel", False):
            raise PatchError(f"{point.site.path} is split over devices by expert; record without expert parallelism")
        hidden, chosen, weights = (*args, *kwargs.values())
        refuse_distributed(point.site, hidden)
        return self.by_expert(hidden, chosen, weights, point.recorder.groups_at(point, hidden).group)

    def by_expert(self, hidden: Tensor, chosen: Tensor, weights: Tensor, group: Tensor | None) -> Tensor:
        """Returns the weighted sum of the chosen experts, computed expert by expert.

        Args:
            hidden: [tokens, width of the model].
            chosen: [tokens, experts a token] int64.
            weights: of the chosen experts, in the shape of chosen.
            group: of the tokens, [tokens] int8, to record them, or None.
        """
        state: ExpertsState = getattr(self, STATE)
        recorder, stack = state.point.recorder, state.stack
        per_token = chosen.shape[-1]
        expert, order = torch.sort(chosen.flatten(), stable=True)
        token = order // per_token
        edges = torch.arange(stack.experts + 1, device=expert.device)
        bounds = torch.searchsorted(expert, edges)
        z = expert_linear(hidden[token], getattr(self, stack.gate_up), bounds, stack.transposed)
        z = z if stack.gate_up_bias is None else z + getattr(self, stack.gate_up_bias)[expert]
        if state.activation is None:
            gate_function: Callable[[Tensor], Tensor] = getattr(self, "_apply_gate")  # noqa: B009
            h = gate_function(z)
        else:
            gate, up = (z[..., part] for part in state.slices)
            h = ops.gated_activation(gate, up, state.activation, backend=recorder.backend)
        if group is not None:
            h = recorder.observe_experts(state.point, h, group[token], expert, bounds)
        y = expert_linear(h, getattr(self, stack.down), bounds, stack.transposed)
        y = y if stack.down_bias is None else y + getattr(self, stack.down_bias)[expert]
        y = y * weights.flatten()[order][:, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y[back].reshape(len(hidden), per_token, -1).sum(1).to(hidden.dtype)


def expert_linear(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    """Multiplies the rows of each expert by its own matrix.

    Args:
        x: [rows, inputs], sorted by expert.
        weight: [experts, outputs, inputs], or [experts, inputs, outputs] if transposed.
        bounds: [experts + 1] int64, where the rows of each expert begin.
        transposed: how the weight is stored.
    """
    y: Tensor
    if torch.compiler.is_compiling():
        # Loops over the tokens of experts cannot be compiled; transformers has an operator that can.
        from transformers.integrations import moe

        y = moe._grouped_mm(x, weight if transposed else weight.transpose(1, 2), offs=bounds[1:].to(torch.int32))
        return y
    edges = bounds.tolist()
    outputs = [
        F.linear(x[start:end], matrix.T if transposed else matrix)
        for matrix, (start, end) in zip(weight.unbind(0), pairwise(edges), strict=True)
        if end > start
    ]
    return torch.cat(outputs) if outputs else x.new_zeros(0, weight.shape[2 if transposed else 1])
