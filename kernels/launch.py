"""What every launch function shares: device, warps, interpreter."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from triton.runtime import driver

INTERPRETED = bool(triton.knobs.runtime.interpret)


def on_device(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Context in which kernels run on the device of `tensor`, whichever device is current."""
    if tensor.device.type == "cpu":
        return nullcontext()
    return torch.accelerator.device_index(tensor.device.index)


@functools.cache
def warps(threads: int) -> int:
    """Warps that make up `threads` threads: warps have 32 lanes on NVIDIA, 64 on AMD's data center GPUs."""
    return threads // (32 if INTERPRETED else driver.active.get_current_target().warp_size)
