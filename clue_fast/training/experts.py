"""Stacked experts of which only some channels train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from clue_fast.errors import SparseError
from clue_fast.sites.experts import Stack, find_stack
from clue_fast.training.graft import graft
from clue_fast.training.modules import SparseModule
from clue_fast.training.parts import TrainedPart

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
