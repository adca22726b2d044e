"""Accumulators: what recording adds up of every unit by token group, and what operators ask of those they are given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from clue_fast.errors import UnknownNameError

FIELDS = ("sum", "square_sum", "magnitude_sum", "magnitude_max", "active_count")
GRADIENT_FIELDS = ("product_sum", "product_magnitude_sum", "product_square_sum")

SUMS: dict[str, tuple[str, ...]] = {
    "all": FIELDS,
    "moments": ("sum", "square_sum"),
    "magnitude": ("magnitude_sum",),
}
"""Sets of FIELDS that recording can take alone, for less: the other fields of the accumulators stay as they are."""
GRADIENT_SUMS: dict[str, tuple[str, ...]] = {"all": GRADIENT_FIELDS, "magnitude": ("product_magnitude_sum",)}
"""The same of GRADIENT_FIELDS."""


STATISTICS: dict[str, tuple[str, ...]] = {
    "mean": ("sum",),
    "variance": ("sum", "square_sum"),
    "abs_mean": ("magnitude_sum",),
    "max_abs": ("magnitude_max",),
    "active_fraction": ("active_count",),
    "attribution": ("product_sum",),
    "abs_attribution": ("product_magnitude_sum",),
    "square_attribution": ("product_square_sum",),
}
"""What statistics have of units, and the sums of FIELDS and GRADIENT_FIELDS that it is made of."""


def fields_of(statistics: Iterable[str]) -> frozenset[str]:
    """Returns the sums that statistics are made of. Raises UnknownNameError if there is none of such a name."""
    fields: set[str] = set()
    for name in statistics:
        if name not in STATISTICS:
            raise UnknownNameError("statistic", name, STATISTICS)
        fields.update(STATISTICS[name])
    return frozenset(fields)


def sums_with(fields: Iterable[str], sets: Mapping[str, tuple[str, ...]]) -> str:
    """Returns the smallest of SUMS or GRADIENT_SUMS that holds some fields."""
    asked = set(fields)
    return min((name for name in sets if asked <= set(sets[name])), key=lambda name: len(sets[name]))


def check_sums(sums: str, gradient_sums: str) -> None:
    """Raise UnknownNameError unless these are of SUMS and of GRADIENT_SUMS."""
    if sums not in SUMS:
        raise UnknownNameError("set of sums", sums, SUMS)
    if gradient_sums not in GRADIENT_SUMS:
        raise UnknownNameError("set of gradient sums", gradient_sums, GRADIENT_SUMS)


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
