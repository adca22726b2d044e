"""Statistics of units, of one site or of stacked experts at once: every expert sees a range of the rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import wide
from clue_fast.ops.channel_statistics import channel_statistics
from clue_fast.ops.conflict_score import SCORING, Scoring, packed


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
    a: Tensor = torch.linalg.vector_norm(wide(h).reshape(*h.shape[:-1], -1, channels), dim=-1)
    return a.double()


def expert_ranges(bounds: Tensor) -> list[tuple[int, tuple[int, int]]]:
    """Returns the experts that have rows, and the range of their rows."""
    edges = bounds.tolist()
    return [(e, (start, end)) for e, (start, end) in enumerate(pairwise(edges)) if end > start]


@torch.no_grad()
def _expert_statistics(
    a: Tensor, group: Tensor, statistics: Tensor, bounds: Tensor, backend: str | None = None, *scoring: Any
) -> None:
    width, whole = a.shape[-1], packed(scoring)
    for expert, (start, end) in expert_ranges(bounds):
        rows, columns = slice(start, end), slice(expert * width, (expert + 1) * width)
        part = None if whole is None else whole.of_expert(expert, width)
        channel_statistics(a[rows], group[rows], statistics[:, :, columns], scoring=part, backend=backend)


# One operator, since torch.compile cannot look into a loop over the tokens of experts.

backends.define(
    "expert_statistics(Tensor x, Tensor group, Tensor(a!) statistics, Tensor bounds, str? backend=None, "
    f"{SCORING}) -> ()",
    _expert_statistics,
)


def add_statistics(
    a: Tensor,
    group: Tensor,
    statistics: Tensor,
    bounds: Tensor | None = None,
    backend: str | None = None,
    scoring: Scoring | None = None,
) -> None:
    """Adds activations to the accumulators of each token's group.

    Args:
        a: [tokens, units].
        group: [tokens] int8.
        statistics: [groups, fields, units] float64, or [groups, fields, experts * units] with bounds.
        bounds: [experts + 1] int64: the tokens of expert e are those from bounds[e] to bounds[e + 1].
        backend: forces one.
        scoring: also writes scores, see ``channel_statistics``; with bounds, of all experts. Those of an expert
            without tokens stay as they are.
    """
    if bounds is None:
        channel_statistics(a, group, statistics, scoring=scoring, backend=backend)
    else:
        arguments = a.detach(), group, statistics, bounds, backend, *(scoring or ())
        backends.run("expert_statistics", _expert_statistics, *arguments)
