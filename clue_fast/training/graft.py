"""Grafts the gradient of some slices of a weight onto what a layer has computed, without computing it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.training.parts import TrainedPart

ROWS, COLUMNS = 0, 1


def graft(out: Tensor, x: Tensor, part: TrainedPart, output_dim: int = 0) -> Tensor:
    """Returns the output of a linear layer, through which the slices of its weight or bias get their gradient.

    Records that must not train the part, see ``Reach``, do not.

    Args:
        out: [..., out_features], what the layer computed with the whole weight.
        x: [..., in_features], its input.
        part: of the layer's "weight" or "bias".
        output_dim: dimension of the weight that counts its outputs: 0 as in ``nn.Linear``, 1 as in Conv1D.
    """
    if not part.selected.requires_grad or not torch.is_grad_enabled():
        return out
    rows = part.reach.rows(x, part.path) if part.category == "forget" else len(x)
    if rows == 0:
        return out
    if part.weight.dim() == 1:
        grafted: Tensor = _Bias.apply(out, part.selected, part.index, rows)  # type: ignore[no-untyped-call]
    else:
        dim = ROWS if part.dim == output_dim else COLUMNS
        grafted = _Weight.apply(  # type: ignore[no-untyped-call]
            out, x.detach()[:rows], part.selected, part.index, dim, output_dim == 1
        )
    return grafted


def graft_weight(weight: Tensor, parts: list[TrainedPart]) -> Tensor:
    """Returns a weight through which its slices get their gradient, whatever is computed with it.

    For layers of which only the definition is known: the gradient of the whole weight is computed, and dropped.
    """
    grafted: Tensor = _Whole.apply(weight, parts, *(part.selected for part in parts))  # type: ignore[no-untyped-call]
    return grafted


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, selected: Tensor, index: Tensor, dim: int, swapped: bool) -> Tensor:
        kept = x if dim == ROWS else x.index_select(-1, index)
        ctx.save_for_backward(kept.to(out.dtype), index)
        ctx.dim, ctx.swapped = dim, swapped
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, index = ctx.saved_tensors
        found = torch.ops.clue_fast.sparse_linear_backward(grad[: len(kept)], kept, index, ctx.dim, None)
        return grad, None, found.t().contiguous() if ctx.swapped else found, None, None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, selected: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = rows
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        chosen = grad[: ctx.rows].reshape(-1, grad.shape[-1]).index_select(1, index)
        return grad, chosen.sum(0, dtype=torch.float32), None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, parts: list[TrainedPart], *selected: Tensor) -> Tensor:
        ctx.slices = [(part.lead, part.dim, part.index) for part in parts]
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = [
            (grad if lead is None else grad[lead]).index_select(dim, index).float() for lead, dim, index in ctx.slices
        ]
        return None, None, *found
