"""Statistics of every channel of a tensor by token group, added to accumulators in place."""

from __future__ import annotations

import torch
from torch import Tensor

from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import check_group, check_statistics, rows
from clue_fast.ops.backend import define

# The definition: launch functions in plain PyTorch, float64 throughout.


def reference_statistics(x: Tensor, group: Tensor, statistics: Tensor) -> None:
    """Adds FIELDS of x to the row of each token's group."""
    for index, row in enumerate(statistics.unbind(0), start=1):
        a = torch.where((group == index)[:, None], x, 0.0).double()  # no look at how many, which would wait for a GPU
        if a.shape[0] == 0:
            continue
        magnitude = a.abs()
        row[0] += a.sum(0)
        row[1] += a.square().sum(0)
        row[2] += magnitude.sum(0)
        row[3].copy_(torch.maximum(row[3], magnitude.amax(0)))
        row[4] += (a > 0).sum(0)


def reference_attribution(x: Tensor, grad: Tensor, group: Tensor, gradient_statistics: Tensor) -> None:
    """Adds GRADIENT_FIELDS of x * grad to the row of each token's group."""
    for index, row in enumerate(gradient_statistics.unbind(0), start=1):
        product = torch.where((group == index)[:, None], x.double() * grad.double(), 0.0)
        row[0] += product.sum(0)
        row[1] += product.abs().sum(0)
        row[2] += product.square().sum(0)


backends.register(
    "channel_statistics",
    ("reference", "cpp", "triton"),
    {"channel_statistics": reference_statistics, "channel_attribution": reference_attribution},
)


# Schema and fake, for torch.compile.


def _statistics(x: Tensor, group: Tensor, statistics: Tensor, backend: str | None = None) -> None:
    launch = backends.launch_for("channel_statistics", "channel_statistics", x, backend)
    launch(rows(x), group.reshape(-1), statistics)


def _attribution(
    x: Tensor, grad: Tensor, group: Tensor, gradient_statistics: Tensor, backend: str | None = None
) -> None:
    launch = backends.launch_for("channel_statistics", "channel_attribution", x, backend)
    launch(rows(x), rows(grad), group.reshape(-1), gradient_statistics)


define(
    "channel_statistics(Tensor x, Tensor group, Tensor(a!) statistics, str? backend=None) -> ()",
    _statistics,
)


define(
    "channel_attribution(Tensor x, Tensor grad, Tensor group, Tensor(a!) gradient_statistics, str? backend=None) -> ()",
    _attribution,
)


@torch.no_grad()
def channel_statistics(x: Tensor, group: Tensor, statistics: Tensor, *, backend: str | None = None) -> None:
    """Add the statistics of x to the accumulators of each token's group; x takes no part in autograd.

    Per channel: sum, sum of squares, sum of magnitudes, greatest magnitude, and the number of tokens in which
    it is active, a > 0 (Pochinkov & Schoots 2024, arXiv 2403.01267). Tokens are counted by the caller. NaN
    and infinity reach the sums.

    Args:
        x: [..., channels], float32, bfloat16 or float16 (float64 on the reference backend).
        group: int8, one for each token; g counts into row g - 1; 0, and g beyond the rows, are not counted.
        statistics: float64 [groups, len(FIELDS), channels], last dimension contiguous, updated in place.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    check_group(group, x)
    check_statistics(x, statistics, None)
    backends.run("channel_statistics", _statistics, x.detach(), group, statistics, backend)


@torch.no_grad()
def channel_attribution(
    x: Tensor, grad: Tensor, group: Tensor, gradient_statistics: Tensor, *, backend: str | None = None
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
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    if x.shape != grad.shape or x.dtype != grad.dtype:
        raise ValueError(f"x and grad differ: {list(x.shape)} {x.dtype} against {list(grad.shape)} {grad.dtype}")
    check_group(group, x)
    check_statistics(x, None, gradient_statistics)
    arguments = x.detach(), grad.detach(), group, gradient_statistics, backend
    backends.run("channel_attribution", _attribution, *arguments)
