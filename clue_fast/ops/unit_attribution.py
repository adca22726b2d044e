"""a·∂L/∂a of units, added to accumulators in the backward pass: of one site, or of stacked experts at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import wide
from clue_fast.ops.channel_statistics import channel_attribution
from clue_fast.ops.conflict_score import Scoring, check_eager, packed
from clue_fast.ops.expert_statistics import expert_ranges


def _add_attribution(
    h: Tensor,
    grad: Tensor,
    group: Tensor,
    statistics: Tensor,
    channels: int = 1,
    bounds: Tensor | None = None,
    backend: str | None = None,
    *scoring: Any,
) -> None:
    whole = packed(scoring)
    h, grad, group = h.flatten(0, -2), grad.flatten(0, -2), group.flatten()
    if channels > 1:
        h = (wide(h) * wide(grad)).reshape(len(h), -1, channels).sum(-1).double()
        grad = torch.ones_like(h)
    if bounds is None:
        channel_attribution(h, grad, group, statistics, scoring=whole, backend=backend)
        return
    width = h.shape[-1]
    for expert, (start, end) in expert_ranges(bounds):
        rows, columns = slice(start, end), slice(expert * width, (expert + 1) * width)
        part = None if whole is None else whole.of_expert(expert, width)
        channel_attribution(h[rows], grad[rows], group[rows], statistics[:, :, columns], scoring=part, backend=backend)


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
        scoring: Scoring | None,
        traced: bool,
    ) -> Tensor:
        ctx.save_for_backward(h, group, bounds)
        # The accumulators stay aside, since other steps may add to them before this backward runs.
        ctx.statistics, ctx.scoring = statistics, scoring
        ctx.channels, ctx.backend, ctx.traced = channels, backend, traced
        return h.clone() if traced else h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, group, bounds = ctx.saved_tensors
        arguments = h, grad, group, ctx.statistics, ctx.channels, bounds, ctx.backend
        if ctx.traced:
            torch.ops.clue_fast.unit_attribution(*arguments)
        else:
            _add_attribution(*arguments, *(ctx.scoring or ()))
        return grad, None, None, None, None, None, None, None


def _traced(
    h: Tensor,
    group: Tensor,
    statistics: Tensor,
    channels: int = 1,
    bounds: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    arguments = h, group, statistics, channels, bounds, backend, None
    out: Tensor = _Attribution.apply(*arguments, True)  # type: ignore[no-untyped-call]
    return out


def _eager(h: Tensor, *arguments: Any, scoring: Scoring | None = None) -> Tensor:
    out: Tensor = _Attribution.apply(h, *arguments, scoring, False)  # type: ignore[no-untyped-call]
    return out


# Schema, fake and autograd, for torch.compile, which cannot look into loops over the tokens of experts.

backends.define(
    "unit_attribution(Tensor x, Tensor grad, Tensor group, Tensor(a!) statistics, int channels=1, "
    "Tensor? bounds=None, str? backend=None) -> ()",
    _add_attribution,
)


backends.define(
    "watch_gradient(Tensor x, Tensor group, Tensor statistics, int channels=1, Tensor? bounds=None, "
    "str? backend=None) -> Tensor",
    lambda x, *_: x.clone(),
    lambda x, *_: torch.empty_like(x),
)


backends.define_autograd("watch_gradient", _traced)


def watch_gradient(
    h: Tensor,
    group: Tensor,
    statistics: Tensor,
    channels: int = 1,
    bounds: Tensor | None = None,
    backend: str | None = None,
    scoring: Scoring | None = None,
) -> Tensor:
    """Returns h such that backward adds its a·∂L/∂a to the accumulators.

    Args:
        h: [..., units * channels].
        group: [tokens] int8.
        statistics: [groups, gradient fields, units] float64, or [..., experts * units] with bounds.
        channels: of one unit, see ``unit_activations``.
        bounds: see ``add_statistics``.
        backend: forces one.
        scoring: the backward also writes scores, see ``add_statistics``; for eager code.
    """
    arguments = h, group, statistics, channels, bounds, backend
    if scoring is not None:
        return _eager(*arguments, scoring=check_eager(scoring))
    out: Tensor = backends.run("watch_gradient", _eager, *arguments)
    return out
