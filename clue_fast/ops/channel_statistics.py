"""Statistics of every channel of a tensor by token group, added to accumulators in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import (
    FIELDS,
    GRADIENT_FIELDS,
    GRADIENT_SUMS,
    SUMS,
    check_group,
    check_statistics,
    rows,
)
from clue_fast.ops.backend import define
from clue_fast.ops.conflict_score import SCORING, Scoring, checked, reference_scores

# The definition: launch functions in plain PyTorch, float64 throughout. They may be given the fields of a `Scoring`.


_TERMS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda a: a,
    "square_sum": torch.square,
    "magnitude_sum": torch.abs,
    "active_count": lambda a: a > 0,
}


def reference_statistics(x: Tensor, group: Tensor, statistics: Tensor, *scoring: Any, sums: str = "all") -> None:
    """Adds FIELDS of x, or those of a set of SUMS, to the row of each token's group."""
    if x.shape[0] == 0:
        return
    for index, row in enumerate(statistics.unbind(0), start=1):
        a = torch.where((group == index)[:, None], x, 0.0).double()  # no look at how many, which would wait for a GPU
        for field in SUMS[sums]:
            total = row[FIELDS.index(field)]
            if field == "magnitude_max":
                total.copy_(torch.maximum(total, a.abs().amax(0)))
            else:
                total += _TERMS[field](a).sum(0)
    reference_scores(statistics, *scoring)


def reference_attribution(
    x: Tensor, grad: Tensor, group: Tensor, gradient_statistics: Tensor, *scoring: Any, sums: str = "all"
) -> None:
    """Adds GRADIENT_FIELDS of x * grad, or those of a set of GRADIENT_SUMS, to the row of each token's group."""
    if x.shape[0] == 0:
        return
    for index, row in enumerate(gradient_statistics.unbind(0), start=1):
        product = torch.where((group == index)[:, None], x.double() * grad.double(), 0.0)
        terms = product, product.abs(), product.square()
        for field in GRADIENT_SUMS[sums]:
            place = GRADIENT_FIELDS.index(field)
            row[place] += terms[place].sum(0)
    reference_scores(gradient_statistics, *scoring)


backends.register(
    "channel_statistics",
    ("reference", "cpp", "triton"),
    {"channel_statistics": reference_statistics, "channel_attribution": reference_attribution},
)


# Schema and fake, for torch.compile.


def _statistics(x: Tensor, group: Tensor, statistics: Tensor, backend: str | None = None, *scoring: Any) -> None:
    launch = backends.launch("channel_statistics", "channel_statistics", x.device, backend)
    launch(rows(x), group.reshape(-1), statistics, *scoring)


def _attribution(
    x: Tensor, grad: Tensor, group: Tensor, gradient_statistics: Tensor, backend: str | None = None, *scoring: Any
) -> None:
    launch = backends.launch("channel_statistics", "channel_attribution", x.device, backend)
    launch(rows(x), rows(grad), group.reshape(-1), gradient_statistics, *scoring)


define(
    f"channel_statistics(Tensor x, Tensor group, Tensor(a!) statistics, str? backend=None, {SCORING}) -> ()",
    _statistics,
)


define(
    "channel_attribution(Tensor x, Tensor grad, Tensor group, Tensor(a!) gradient_statistics, str? backend=None, "
    f"{SCORING}) -> ()",
    _attribution,
)


@torch.no_grad()
def channel_statistics(
    x: Tensor, group: Tensor, statistics: Tensor, *, scoring: Scoring | None = None, backend: str | None = None
) -> None:
    """Add the statistics of x to the accumulators of each token's group; x takes no part in autograd.

    Per channel: sum, sum of squares, sum of magnitudes, greatest magnitude, and the number of tokens in which
    it is active, a > 0 (Pochinkov & Schoots 2024, arXiv 2403.01267). Tokens are counted by the caller. NaN
    and infinity reach the sums.

    Args:
        x: [..., channels], float32, bfloat16, float16 or float64, in which float64 is summed.
        group: int8, one for each token; g counts into row g - 1; 0, and g beyond the rows, are not counted.
        statistics: float64 [groups, len(FIELDS), channels], last dimension contiguous, updated in place.
        scoring: also writes the scores of the channels as `conflict_score` gives them afterwards, in the same launch;
            without tokens nothing is written.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        UnknownNameError, BackendError: the backend or criterion is unknown, or cannot run here.
    """
    check_group(group, x)
    check_statistics(x, statistics, None)
    arguments = x.detach(), group, statistics, backend, *checked(scoring, statistics)
    backends.run("channel_statistics", _statistics, *arguments)


@torch.no_grad()
def channel_attribution(
    x: Tensor,
    grad: Tensor,
    group: Tensor,
    gradient_statistics: Tensor,
    *,
    scoring: Scoring | None = None,
    backend: str | None = None,
) -> None:
    """Add p = x * grad, its magnitude and its square to the accumulators of each token's group.

    p is the first-order effect on the loss of setting the channel to zero, with its sign turned (attribution
    patching: Syed, Rager & Conmy 2023, arXiv 2310.10348).

    Args:
        x: [..., channels], the activation; dtypes as in `channel_statistics`.
        grad: dL/dx, in shape and dtype of x.
        group: int8, one for each token; g counts into row g - 1; 0, and g beyond the rows, are not counted.
        gradient_statistics: float64 [groups, len(GRADIENT_FIELDS), channels], last dimension contiguous,
            updated in place.
        scoring: as in `channel_statistics`, of a criterion that reads gradient statistics.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        UnknownNameError, BackendError: the backend or criterion is unknown, or cannot run here.
    """
    if x.shape != grad.shape or x.dtype != grad.dtype:
        raise ValueError(f"x and grad differ: {list(x.shape)} {x.dtype} against {list(grad.shape)} {grad.dtype}")
    check_group(group, x)
    check_statistics(x, None, gradient_statistics)
    arguments = x.detach(), grad.detach(), group, gradient_statistics, backend, *checked(scoring, gradient_statistics)
    backends.run("channel_attribution", _attribution, *arguments)
