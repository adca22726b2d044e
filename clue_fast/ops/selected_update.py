"""What the optimizers of selected rows and columns share: their arguments, and rounding into the weight."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


# Stochastic rounding: up with the probability of the part that is cut off, so that the mean is exact. Its random
# bits are a hash, the same on every backend and for every number of threads.


def random_bits(shape: Sequence[int], seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each element of a selected part [rows, columns], as int64.

    Two keys come from seed and step by splitmix64 (Steele, Lea & Flood 2014). The position, counted along the
    rows, is hashed with a bijection of 32 bits (Wellons 2018, lowbias32); the second key comes in half way, so
    that the numbers of two weights or steps are not shifted copies of one another.
    """
    z = (seed + step * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    z ^= z >> 31
    x = (torch.arange(math.prod(shape), device=device) + (z & MASK32)) & MASK32
    x = ((x ^ x >> 16) * 0x7FEB352D) & MASK32
    x = (((x ^ x >> 15) + (z >> 32) & MASK32) * 0x846CA68B) & MASK32
    return (x ^ x >> 16).view(*shape)


def round_stochastically(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """X, float32, in another dtype; `random` holds 32 bits for each element. NaN and infinity stay what they are."""
    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32).to(torch.int64) & MASK32
    if dtype == torch.bfloat16:
        rounded = (bits + (random >> 16)) >> 16
    else:
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude + (random >> 19) >> 13) - (112 << 10)
        # In units of the smallest subnormal, plus a uniform number below one, whole units are what is left.
        uniform = (random >> 9).float() * 2.0**-23
        subnormal = (x.abs().clamp(max=2.0**-14) * 2.0**24 + uniform).to(torch.int64)
        half = torch.where(magnitude < 113 << 23, subnormal, normal).clamp(max=0x7C00)
        rounded = bits >> 16 & 0x8000 | half
    signed = torch.where(rounded < 2**15, rounded, rounded - 2**16).to(torch.int16)
    return torch.where(x.isfinite(), signed.view(dtype), x.to(dtype))


# The arguments. An operator takes one list for each of these, with one entry a weight.


def check(
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    values: Sequence[Tensor] | None,
    others: dict[str, Sequence[Tensor]],
) -> None:
    """Raise ValueError unless every list fits the weights; `others` are gradients and moments, by name."""
    selected = {**({} if values is None else {"values": values}), **others}
    for name, entries in {**selected, "indices": indices, "dims": dims}.items():
        if len(entries) != len(weights):
            raise ValueError(f"{len(weights)} weights, but {len(entries)} {name}")
    for i, (weight, index, dim) in enumerate(zip(weights, indices, dims, strict=True)):
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(f"weight {i} must be contiguous with two dimensions, not {list(weight.shape)}")
        if dim not in (0, 1):
            raise ValueError(f"dims[{i}] must be 0 for rows or 1 for columns, not {dim}")
        if index.dtype != torch.int64:
            raise ValueError(f"indices[{i}] must be int64, not {index.dtype}")
        rows, columns = weight.shape
        shape = (index.shape[0], columns) if dim == 0 else (rows, index.shape[0])
        for name, entries in selected.items():
            tensor = entries[i]
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous {list(shape)} float32, not {list(tensor.shape)} {tensor.dtype}"
                )


def check_numbers(
    device: torch.device, count: int, numbers: dict[str, tuple[Tensor, torch.dtype]], seed: Tensor | None
) -> None:
    """Raise ValueError unless there is one number a weight, on CPU or on the device of the weights."""
    wanted = {**numbers, **({} if seed is None else {"seed": (seed, torch.int64)})}
    for name, (tensor, dtype) in wanted.items():
        if tensor.shape != (count,) or tensor.dtype != dtype or tensor.device.type not in ("cpu", device.type):
            raise ValueError(
                f"{name} must be {dtype} [{count}] on cpu or {device.type}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def check_scale(device: torch.device, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Raise ValueError unless these are single float32 numbers where the weights are."""
    for name, tensor in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if tensor is None:
            continue
        if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device.type != device.type:
            raise ValueError(
                f"{name} must be one float32 on {device.type}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def check_masters(weights: Iterable[Tensor], values: Sequence[Tensor] | None, seed: Tensor | None) -> None:
    """Raise ValueError unless no update is lost: by master values or stochastic rounding, or in float32."""
    if values is not None and seed is not None:
        raise ValueError("give either values, the float32 masters, or a seed to round stochastically, not both")
    if values is None and seed is None and any(weight.dtype != torch.float32 for weight in weights):
        raise ValueError("16-bit weights need values, the float32 masters, or a seed to round stochastically")


def written(weights: Iterable[Tensor], values: Iterable[Tensor] | None) -> None:
    """Tell autograd, which a launch function does not: a backward that still needs the old weights must notice."""
    torch.autograd.graph.increment_version([*weights, *(values or ())])
