"""Adding activations, and a·∂L/∂a in backward passes, to accumulators; of one site, or of stacked experts at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast import ops
from clue_fast.ops.backend import define, define_autograd


def unit_activations(h: Tensor, channels: int) -> Tensor:
    """Returns the activations of units made of so many channels each: [..., units * channels] to [..., units].

    The activation of one channel is the channel itself. That of a head is the Euclidean norm of what it puts into
    the input of the output projection, the weighted sum of its values. Scaling a head by s scales the norm by s,
    and a·∂L/∂a is the effect of that scaling, the sum of h·∂L/∂h over its channels, as in Michel et al. 2019
    (arXiv 1905.10650); norms of heads: Kobayashi et al. 2020 (arXiv 2004.10102).

    Norms are float64, so that their sums are: never negative and often far from 0 for their spread, they would lose
    their variance in sums of float32 squares. They are few.
    """
    if channels == 1:
        return h
    a: Tensor = torch.linalg.vector_norm(_wide(h).reshape(*h.shape[:-1], -1, channels), dim=-1)
    return a.double()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def add_statistics(
    a: Tensor, group: Tensor, statistics: Tensor, bounds: Tensor | None = None, backend: str | None = None
) -> None:
    """Adds activations to the accumulators of each token's group.

    Args:
        a: [tokens, units].
        group: [tokens] int8.
        statistics: [groups, fields, units] float64, or [groups, fields, experts * units] with bounds.
        bounds: [experts + 1] int64: the tokens of expert e are those from bounds[e] to bounds[e + 1].
        backend: forces one.
    """
    if bounds is None:
        ops.channel_statistics(a, group, statistics, backend=backend)
    elif torch.compiler.is_compiling():
        torch.ops.clue_fast.expert_statistics(a.detach(), group, statistics, bounds, backend)
    else:
        _expert_statistics(a.detach(), group, statistics, bounds, backend)


@torch.no_grad()
def _expert_statistics(
    a: Tensor, group: Tensor, statistics: Tensor, bounds: Tensor, backend: str | None = None
) -> None:
    width = a.shape[-1]
    for expert, (start, end) in expert_ranges(bounds):
        columns = slice(expert * width, (expert + 1) * width)
        ops.channel_statistics(a[start:end], group[start:end], statistics[:, :, columns], backend=backend)


def _add_attribution(
    h: Tensor,
    grad: Tensor,
    group: Tensor,
    statistics: Tensor,
    channels: int = 1,
    bounds: Tensor | None = None,
    backend: str | None = None,
) -> None:
    h, grad, group = h.flatten(0, -2), grad.flatten(0, -2), group.flatten()
    if channels > 1:
        h = (_wide(h) * _wide(grad)).reshape(len(h), -1, channels).sum(-1).double()
        grad = torch.ones_like(h)
    if bounds is None:
        ops.channel_attribution(h, grad, group, statistics, backend=backend)
        return
    width = h.shape[-1]
    for expert, (start, end) in expert_ranges(bounds):
        rows, columns = slice(start, end), slice(expert * width, (expert + 1) * width)
        ops.channel_attribution(h[rows], grad[rows], group[rows], statistics[:, :, columns], backend=backend)


def expert_ranges(bounds: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Returns the experts that have rows, and the range of their rows."""
    edges = bounds.tolist()
    return [(e, (start, end)) for e, (start, end) in enumerate(pairwise(edges)) if end > start]


class _Attribution(torch.autograd.Function):
    """Passes h on; backward adds h·∂L/∂h to the accumulators."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        group: Tensor,
        statistics: Tensor,
        channels: int,
        bounds: Tensor | None,
        backend: str | None,
        traced: bool,
    ) -> Tensor:
        ctx.save_for_backward(h, group, bounds)
        # The accumulators stay aside, since other steps may add to them before this backward runs.
        ctx.statistics, ctx.channels, ctx.backend, ctx.traced = statistics, channels, backend, traced
        return h.clone() if traced else h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, group, bounds = ctx.saved_tensors
        run = torch.ops.clue_fast.unit_attribution if ctx.traced else _add_attribution
        run(h, grad, group, ctx.statistics, ctx.channels, bounds, ctx.backend)
        return grad, None, None, None, None, None, None


def _watched(
    h: Tensor,
    group: Tensor,
    statistics: Tensor,
    channels: int = 1,
    bounds: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    out: Tensor = _Attribution.apply(h, group, statistics, channels, bounds, backend, True)  # type: ignore[no-untyped-call]
    return out


def watch_gradient(
    h: Tensor,
    group: Tensor,
    statistics: Tensor,
    channels: int = 1,
    bounds: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Returns h such that backward adds its a·∂L/∂a to the accumulators.

    Args:
        h: [..., units * channels].
        group: [tokens] int8.
        statistics: [groups, gradient fields, units] float64, or [..., experts * units] with bounds.
        channels: of one unit, see ``unit_activations``.
        bounds: see ``add_statistics``.
        backend: forces one.
    """
    out: Tensor
    if torch.compiler.is_compiling():
        out = torch.ops.clue_fast.watch_gradient(h, group, statistics, channels, bounds, backend)
    else:
        out = _Attribution.apply(h, group, statistics, channels, bounds, backend, False)  # type: ignore[no-untyped-call]
    return out


# The same for torch.compile, which cannot look into loops over the tokens of experts.


def _nothing(*_: Any) -> None:
    return None


define(
    "expert_statistics(Tensor x, Tensor group, Tensor(a!) statistics, Tensor bounds, str? backend=None) -> ()",
    _expert_statistics,
    _nothing,
)


define(
    "unit_attribution(Tensor x, Tensor grad, Tensor group, Tensor(a!) statistics, int channels=1, "
    "Tensor? bounds=None, str? backend=None) -> ()",
    _add_attribution,
    _nothing,
)


define(
    "watch_gradient(Tensor x, Tensor group, Tensor statistics, int channels=1, Tensor? bounds=None, "
    "str? backend=None) -> Tensor",
    lambda x, *_: x.clone(),
    lambda x, *_: torch.empty_like(x),
)


define_autograd("watch_gradient", _watched)
