"""Arithmetic in fp32 shared by the kernels: conversions, exp2 and reciprocal at the cost of one or two instructions.

Triton's own expressions are as exact (2 units in the last place), but on CUDA a third of the instructions they
compile to handles denormal numbers and converts values one by one: 32 instructions a value of h with statistics
instead of 21, of some 43 that an H200 can issue while its memory delivers the value. So CUDA gets the instructions
themselves; ROCm, XPU and the interpreter get Triton's expressions.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq

from .launch import INTERPRETED

_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def exp2(x):
    """2 to the power x; results below 2^-126 are 0 on CUDA."""
    if _INTERPRETED:
        return tl.exp2(x)
    elif cuda_capability_geq(8):
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x; denormal x count as 0 on CUDA."""
    if _INTERPRETED:
        return 1.0 / x
    elif cuda_capability_geq(8):
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def widened(x):
    """Converts x to fp32, exactly; fp64 stays as it is."""
    if x.dtype == tl.float64:
        return x
    elif _INTERPRETED:
        if x.dtype == tl.bfloat16:  # the interpreter's own conversion is wrong for subnormal numbers
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        else:
            return x.to(tl.float32)
    elif cuda_capability_geq(8) and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Rounds fp32 x to `dtype`, to nearest even."""
    if _INTERPRETED:
        if dtype == tl.bfloat16:  # the interpreter's own conversion truncates
            bits = x.to(tl.uint32, bitcast=True)
            nearest = bits + 0x7FFF + ((bits >> 16) & 1)
            nearest = tl.where(x == x, nearest, bits | 0x400000)  # a NaN stays one, and quiet
            return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        else:
            return x.to(dtype)
    elif cuda_capability_geq(8) and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    elif cuda_capability_geq(8) and dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        return x.to(dtype)
