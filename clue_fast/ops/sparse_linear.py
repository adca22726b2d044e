"""A linear layer of which only some rows or columns of the weight have a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.ops import backend as backends

ROWS, COLUMNS = 0, 1


# The definition: the launch function in plain PyTorch, accumulated in float32 (float64 for float64).


def reference_backward(grad: Tensor, x: Tensor, index: Tensor, dim: int, out: Tensor) -> None:
    if dim == ROWS:
        grad = grad.index_select(1, index)
    else:
        x = x.index_select(1, index)
    torch.mm(grad.t().to(out.dtype), x.to(out.dtype), out=out)


backends.register("sparse_linear", ("reference", "cpp"), {"sparse_linear_backward": reference_backward})


def _select(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """What backward needs of x: all of it for rows, the selected columns for columns."""
    return x if dim == ROWS else x.index_select(-1, index)


def _backward(
    grad: Tensor, saved: Tensor, index: Tensor, dim: int, like: Tensor, backend: str | None = None
) -> Tensor:
    """The gradient of the selected part, in shape and dtype of `like`; `saved` is what `_select` kept of x."""
    grad, saved = _rows(grad), _rows(saved)
    if dim == COLUMNS:
        index = torch.arange(index.numel(), device=index.device)
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    if like.dtype == torch.float64:
        backend = "reference"
    backends.launch("sparse_linear", "sparse_linear_backward", grad.device, backend)(grad, saved, index, dim, out)
    return out


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selected: Tensor,
        index: Tensor,
        dim: int,
        backend: str | None,
    ) -> Tensor:
        kept = _select(x, index, dim) if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(weight, selected, index, kept)
        ctx.dim, ctx.backend = dim, backend
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, selected, index, kept = ctx.saved_tensors
        needs_x, _, needs_bias, needs_selected = ctx.needs_input_grad[:4]
        grad_x = grad @ weight if needs_x else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        grad_selected = _backward(grad, kept, index, ctx.dim, selected, ctx.backend) if needs_selected else None
        return grad_x, None, grad_bias, grad_selected, None, None, None


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selected: Tensor,
    index: Tensor,
    dim: int,
    *,
    backend: str | None = None,
) -> Tensor:
    return _Direct.apply(x, weight, bias, selected, index, dim, backend)  # type: ignore[no-any-return]
