"""Accumulators: what recording adds up of every unit by token group, and what operators ask of those they are given."""

from __future__ import annotations

import torch
from torch import Tensor

FIELDS = ("sum", "square_sum", "magnitude_sum", "magnitude_max", "active_count")
GRADIENT_FIELDS = ("product_sum", "product_magnitude_sum", "product_square_sum")


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
