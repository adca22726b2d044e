"""A loss that is a sum of parts, each of which is run backward as soon as it is there.

Then the activations of one part are alive at a time, and not those of all; what is kept of each are the gradients of
what trains, which are small where little does. The loss of all parts hands them on when it is run backward itself, so
that what scales, accumulates or clips gradients sees those of one loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.internals import has_gradient_hooks

Logs = dict[str, Tensor]


def can_run_backward(parameters: Sequence[Tensor]) -> bool:
    """Whether parts of a loss can be run backward before it is: gradients are on, and nobody waits for them."""
    return torch.is_grad_enabled() and bool(parameters) and not any(map(has_gradient_hooks, parameters))


def run_backward(parts: Iterable[tuple[Tensor, Logs]], parameters: Sequence[Tensor]) -> tuple[Tensor, Logs]:
    """Runs every part of a loss backward before the next one is asked for.

    Args:
        parts: a scalar and detached scalars to log, each.
        parameters: what trains. Gradients that they have stay what they are.

    Returns:
        The sum of all parts, which can be run backward once, and the sums of what they log.
    """
    values: list[Tensor] = []
    logs: Logs = {}
    with _other_gradients(parameters) as gradients:
        for part, of_part in parts:
            values.append(part.detach())
            if part.requires_grad:
                torch.autograd.backward(part)  # not autograd.grad, under which hooks of modules ask what it cannot say
            del part
            logs = {**logs, **{name: value + logs.get(name, 0.0) for name, value in of_part.items()}}
    loss: Tensor = _Known.apply(torch.stack(values).sum(), gradients, *parameters)  # type: ignore[no-untyped-call]
    return loss, logs


@contextmanager
def _other_gradients(parameters: Sequence[Tensor]) -> Iterator[list[Tensor | None]]:
    """Gradients from the block alone, which are in the list at its end; outside of it, there are those of before."""
    before = [parameter.grad for parameter in parameters]
    found: list[Tensor | None] = []
    for parameter in parameters:
        parameter.grad = None
    try:
        yield found
        found += [parameter.grad for parameter in parameters]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


class _Known(torch.autograd.Function):
    """A value whose gradient by some parameters is known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if own is None else own * grad.to(own.device, own.dtype) for own in ctx.saved_tensors)
        return None, None, *scaled
