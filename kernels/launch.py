"""What every launch function and kernel shares: the device context, warps for a number of threads, rounding."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from triton.runtime import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which kernels run on the device of `tensor`, whichever device is current."""
    return nullcontext() if tensor.device.type == "cpu" else torch.accelerator.device_index(tensor.device.index)


@functools.cache
def warps(threads: int) -> int:
    """Warps that make up `threads` threads: warps have 32 lanes on NVIDIA, 64 on AMD's data center GPUs."""
    return threads // (32 if INTERPRETED else driver.active.get_current_target().warp_size)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 `x` in `dtype`, to nearest even; the interpreter's own conversion to bfloat16 would truncate."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        nearest = tl.where(x == x, nearest, bits | 0x400000)  # a NaN stays one, and quiet
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
