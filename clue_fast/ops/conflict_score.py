"""The score of every unit of every site from their statistics, by a closed formula, in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import FIELDS, GRADIENT_FIELDS
from clue_fast.ops.backend import define

CRITERIA_OPS = ("difference", "ratio", "attribution")
VARIANCE_FLOOR = 1e-12
RATIO_FLOOR = 0.01
FORGET, RETAIN = 0, 1  # rows of the groups 1 and 2


# The definition: the launch function in plain PyTorch, float64 until the last step.


def reference(
    statistics: Tensor,
    gradient_statistics: Tensor | None,
    count: Tensor,
    offsets: Tensor,
    criterion: str,
    out: Tensor,
) -> None:
    """Writes the score of every unit; the formulas are in `conflict_score`."""
    widths = offsets.diff()
    tokens = count.double().repeat_interleave(widths, dim=1)[:2]
    if criterion == "attribution":
        if gradient_statistics is None:
            raise ValueError('criterion "attribution" needs gradient_statistics')
        effect = gradient_statistics[:2, GRADIENT_FIELDS.index("product_magnitude_sum")] / tokens
        out.copy_(effect[FORGET] - effect[RETAIN])
    elif criterion == "ratio":
        magnitude = statistics[:2, FIELDS.index("magnitude_sum")] / tokens
        out.copy_(magnitude[FORGET] / (magnitude[RETAIN] + RATIO_FLOOR))
    else:
        mean = statistics[:2, FIELDS.index("sum")] / tokens
        variance = (statistics[:2, FIELDS.index("square_sum")] / tokens - mean.square()).clamp(min=0)
        spread = (variance.mean(0) + VARIANCE_FLOOR).sqrt()
        out.copy_((mean[FORGET] - mean[RETAIN]).abs() / spread)


backends.register("conflict_score", ("reference", "cpp", "triton"), {"conflict_score": reference})


# Schema and fake, for torch.compile.


def _score(
    statistics: Tensor,
    gradient_statistics: Tensor | None,
    count: Tensor,
    offsets: Tensor,
    criterion: str,
    backend: str | None = None,
) -> Tensor:
    out = torch.empty(statistics.shape[2], dtype=torch.float32, device=statistics.device)
    launch = backends.launch("conflict_score", "conflict_score", statistics.device, backend)
    launch(statistics, gradient_statistics, count, offsets, criterion, out)
    return out


def _fake(statistics: Tensor, *_: Any) -> Tensor:
    return statistics.new_empty(statistics.shape[2], dtype=torch.float32)


define(
    "conflict_score(Tensor statistics, Tensor? gradient_statistics, Tensor count, Tensor offsets, "
    "str criterion, str? backend=None) -> Tensor",
    _score,
    _fake,
)


@torch.no_grad()
def conflict_score(
    statistics: Tensor,
    count: Tensor,
    offsets: Tensor,
    criterion: str,
    *,
    gradient_statistics: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every unit from the statistics of group 1, forget, and group 2, retain.

    difference:  |mean_f - mean_r| / sqrt((var_f + var_r) / 2 + 1e-12), the standardized difference of the
        means (Cohen 1988, with the average variance).
    ratio:       E_f|a| / (E_r|a| + 0.01) (Pochinkov & Schoots 2024, arXiv 2403.01267).
    attribution: E_f|p| - E_r|p| with p = a * dL/da.

    E, mean and var are over the counted tokens of the group; where a group has none the score is NaN.
    Computed in float64.

    Args:
        statistics: float64 [groups >= 2, len(FIELDS), units], the units of all sites side by side.
        count: int64 [groups, sites], tokens counted.
        offsets: int64 [sites + 1], where each site begins among the units, from 0 to units.
        criterion: one of CRITERIA_OPS.
        gradient_statistics: float64 [groups, len(GRADIENT_FIELDS), units]; for "attribution" only.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Returns:
        float32 [units].

    Raises:
        ValueError: shapes or dtypes do not fit, or gradient_statistics is missing.
        UnknownNameError: no such criterion or backend.
        BackendError: the backend cannot run here.
    """
    _check(statistics, count, offsets, criterion, gradient_statistics)
    arguments = statistics, gradient_statistics, count, offsets, criterion, backend
    out: Tensor = backends.run("conflict_score", _score, *arguments)
    return out


def _check(
    statistics: Tensor, count: Tensor, offsets: Tensor, criterion: str, gradient_statistics: Tensor | None
) -> None:
    if criterion not in CRITERIA_OPS:
        raise UnknownNameError("criterion", criterion, CRITERIA_OPS)
    if criterion == "attribution" and gradient_statistics is None:
        raise ValueError('criterion "attribution" needs gradient_statistics; record with gradients')
    for name, tensor, fields in (
        ("statistics", statistics, len(FIELDS)),
        ("gradient_statistics", gradient_statistics, len(GRADIENT_FIELDS)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.float64 or tensor.dim() != 3 or tensor.shape[0] < 2 or tensor.shape[1] != fields:
            shape = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} must be [groups >= 2, {fields}, units] float64, not {shape}")
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(f"the last dimension of {name} must be contiguous")
        if tensor.shape[2] != statistics.shape[2]:
            raise ValueError(f"{name} has {tensor.shape[2]} units, statistics has {statistics.shape[2]}")
    if count.dtype != torch.int64 or offsets.dtype != torch.int64:
        raise ValueError(f"count and offsets must be int64, not {count.dtype} and {offsets.dtype}")
    if offsets.dim() != 1 or count.shape != (statistics.shape[0], offsets.numel() - 1):
        raise ValueError(
            f"count must be [groups, sites] and offsets [sites + 1], not {list(count.shape)} and {list(offsets.shape)}"
        )
