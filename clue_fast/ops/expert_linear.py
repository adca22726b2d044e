"""Rows sorted by expert, each times its matrix; one operator, since a loop over tokens cannot be compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.internals import below_autograd
from clue_fast.ops import backend as backends
from clue_fast.ops.backend import define, define_autograd
from clue_fast.ops.expert_statistics import expert_ranges


def _forward(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    matrices = weight if transposed else weight.transpose(1, 2)
    y = x.new_zeros(x.shape[0], matrices.shape[2])
    for expert, (start, end) in expert_ranges(bounds):
        torch.mm(x[start:end], matrices[expert], out=y[start:end])
    return y


def _backward(grad: Tensor, x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    return _forward(grad, weight, bounds, not transposed), _weight_gradient(grad, x, weight, bounds, transposed)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    out = torch.zeros_like(weight)
    for expert, (start, end) in expert_ranges(bounds):
        given, asked = (x, grad) if transposed else (grad, x)
        torch.mm(given[start:end].T, asked[start:end], out=out[expert])
    return out


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool, traced: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bounds)
        ctx.transposed, ctx.traced = transposed, traced
        if not traced:
            return _forward(x, weight, bounds, transposed)
        with below_autograd():
            y: Tensor = torch.ops.clue_fast.expert_linear(x, weight, bounds, transposed)
            return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bounds = ctx.saved_tensors
        arguments = grad.contiguous(), x, weight, bounds, ctx.transposed
        if ctx.traced:
            return *torch.ops.clue_fast.expert_linear_backward(*arguments), None, None, None
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        grad_x = _forward(arguments[0], weight, bounds, not ctx.transposed) if needs_x else None
        return grad_x, _weight_gradient(*arguments) if needs_weight else None, None, None, None


def _traced(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    y: Tensor = _ExpertLinear.apply(x, weight, bounds, transposed, True)  # type: ignore[no-untyped-call]
    return y


def _eager(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    y: Tensor = _ExpertLinear.apply(x, weight, bounds, transposed, False)  # type: ignore[no-untyped-call]
    return y


def _fake(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2 if transposed else 1])


define("expert_linear(Tensor x, Tensor weight, Tensor bounds, bool transposed) -> Tensor", _forward, _fake)


define(
    "expert_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor bounds, bool transposed) -> (Tensor, Tensor)",
    _backward,
    lambda grad, x, weight, *_: (torch.empty_like(x), torch.empty_like(weight)),
)


define_autograd("expert_linear", _traced)


def expert_linear(x: Tensor, weight: Tensor, bounds: Tensor, transposed: bool = False) -> Tensor:
    """Multiplies the rows of each expert by its own matrix, in the precision of the weights.

    Args:
        x: [rows, inputs], sorted by expert.
        weight: [experts, outputs, inputs], or [experts, inputs, outputs] if transposed.
        bounds: [experts + 1] int64, where the rows of each expert begin; rows beyond the last give 0.
        transposed: how the weight is stored.

    Returns:
        [rows, outputs].
    """
    y: Tensor
    with torch.autocast(x.device.type, enabled=False):  # it would cast inside forward and not inside backward
        x = x.to(weight.dtype)
        y = backends.run("expert_linear", _eager, x, weight, bounds, transposed)
    return y
