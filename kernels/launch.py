"""What every launch function shares: device, options, interpreter."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

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
def options(threads: int) -> dict[str, Any]:
    """Options of every launch: as many warps as make up `threads` threads, and products fused with sums.

    Warps have 32 lanes on NVIDIA, 64 on AMD's data center GPUs. Triton's default of fusing changes with 3.10.
    """
    lanes = 32 if INTERPRETED else driver.active.get_current_target().warp_size
    return {"num_warps": threads // lanes, "enable_fp_fusion": True}
