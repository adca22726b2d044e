"""Grafts the gradient of some slices of a weight onto what a layer has computed, without computing it again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.training.parts import TrainedPart

ROWS, COLUMNS = 0, 1


def graft(out: Tensor, x: Tensor, part: TrainedPart, rows: slice | Tensor | None = None) -> Tensor:
    """Returns the output of a linear layer, through which the slices of its weight or bias get their gradient.

    Args:
        out: [..., out_features], what the layer computed with the whole weight.
        x: [..., in_features], its input.
        part: of the layer's weight or bias.
        rows: those of x that train the part; by default those that may, see ``Reach``.
    """
    if not part.selected.requires_grad or not torch.is_grad_enabled():
        return out
    if rows is None:
        rows = slice(part.reach.rows(x, part.path) if part.category == "forget" else len(x))
    kept = x.detach()[rows]
    if len(kept) == 0:
        return out
    if part.selected.dim() == 1:
        grafted: Tensor = _Bias.apply(out, part.selected, part.index, rows)  # type: ignore[no-untyped-call]
    else:
        dim = ROWS if part.dim == part.output_dim else COLUMNS
        transposed = part.output_dim == 1
        grafted = _Weight.apply(  # type: ignore[no-untyped-call]
            out, kept, rows, part.selected, part.index, dim, transposed
        )
    return grafted


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, rows: Any, selected: Tensor, index: Tensor, dim: int, transposed: bool
    ) -> Tensor:
        kept = x if dim == ROWS else x.index_select(-1, index)
        ctx.save_for_backward(kept.to(out.dtype), index)
        ctx.rows, ctx.dim, ctx.transposed = rows, dim, transposed
        return _same(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, index = ctx.saved_tensors
        found = torch.ops.clue_fast.sparse_linear_backward(grad[ctx.rows], kept, index, ctx.dim, None)
        return grad, None, None, found.t().contiguous() if ctx.transposed else found, None, None, None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, selected: Tensor, index: Tensor, rows: Any) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = rows
        return _same(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        chosen = grad[ctx.rows].reshape(-1, grad.shape[-1]).index_select(1, index)
        return grad, chosen.sum(0, dtype=torch.float32), None, None


def _same(ctx: Any, out: Tensor) -> Tensor:
    """The same values with another history. No view where it can be avoided: models add to outputs in place."""
    if torch.compiler.is_compiling() or out._is_view():
        return out.view_as(out)
    ctx.mark_dirty(out)
    return out
