"""Statistics of every channel of a tensor by token group, added to accumulators in place."""

from __future__ import annotations

import torch
from torch import Tensor

from clue_fast.ops import backend as backends
from clue_fast.ops.backend import define

FIELDS = ("sum", "square_sum", "magnitude_sum", "magnitude_max", "active_count")
GRADIENT_FIELDS = ("product_sum", "product_magnitude_sum", "product_square_sum")


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


# What every operator on tokens and channels asks of its arguments.


def rows(x: Tensor) -> Tensor:
    """[..., channels] as [tokens, channels], the last dimension contiguous; a view wherever possible."""
    flat = x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def wide(x: Tensor) -> Tensor:
    """X in the precision that is computed in: float32, or float64 if it is that."""
    return x if x.dtype == torch.float64 else x.float()


def check_group(group: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless group is one int8 for each token of x [..., channels], on the same device."""
    if group is None:
        raise ValueError("statistics need a group: int8, one for each token")
    if group.dtype != torch.int8:
        raise ValueError(f"group must be int8, not {group.dtype}")
    if group.numel() * x.shape[-1] != x.numel():
        raise ValueError(f"group has {group.numel()} tokens, but the activation has shape {list(x.shape)}")
    if group.device != x.device:
        raise ValueError(f"group is on {group.device}, the activation on {x.device}")


def check_statistics(x: Tensor, statistics: Tensor | None, gradient_statistics: Tensor | None) -> None:
    """Raise ValueError unless the accumulators that are given fit the channels of x [..., channels]."""
    if statistics is not None:
        _check_accumulator("statistics", statistics, len(FIELDS), x)
    if gradient_statistics is not None:
        _check_accumulator("gradient_statistics", gradient_statistics, len(GRADIENT_FIELDS), x)


def _check_accumulator(name: str, accumulator: Tensor, fields: int, x: Tensor) -> None:
    shape, channels = accumulator.shape, x.shape[-1]
    if accumulator.dtype != torch.float64:
        raise ValueError(f"{name} must be float64, not {accumulator.dtype}")
    if len(shape) != 3 or shape[1] != fields or shape[2] != channels:
        raise ValueError(f"{name} must be [groups, {fields}, {channels}], not {list(shape)}")
    if accumulator.stride(2) != 1 and channels > 1:
        raise ValueError(f"the last dimension of {name} must be contiguous; its strides are {accumulator.stride()}")
    if accumulator.device != x.device:
        raise ValueError(f"{name} is on {accumulator.device}, the activation on {x.device}")


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
