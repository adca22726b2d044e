"""One optimizer step on selected rows or columns of many weights, a launch per weight, whatever the rule.

The selected part is contiguous in the master values, gradients and moments and walked as one line of values, so that
all of them are read and written 16 bytes at a time, whatever is selected. Rows of the weight are written four values at
a time, columns one by one. The arithmetic is that of csrc/cuda, with every product rounded before it is added, as
PyTorch rounds: what is left out adds up over the steps.

Not one launch for all weights, as in csrc/cuda: Triton compiles a kernel anew for what its arguments divide by, each of
a table by value too, and a table in memory is a copy in every step, which a captured graph would not keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import rounded, widened
from .launch import INTERPRETED, on_device, options

BLOCK = 32768 if INTERPRETED else 1024  # the time of the interpreter is the number of its programs
THREADS = 256
VECTOR = 4
LARGEST = 2**30  # values of a launch: positions are counted in 32 bits
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


# Stochastic rounding. clue_fast/ops/sparse_optimizer.py holds the definition.


@triton.jit
def key_of(seed, step):
    """Two keys of 32 bits of one weight in one step (splitmix64: Steele, Lea & Flood 2014)."""
    z = seed.to(tl.uint64) + step.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def random_bits(first, second, position):
    """32 random bits of each position, uint32 (Wellons 2018, lowbias32, with a key half way)."""
    x = position.to(tl.uint32) + first
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = ((x ^ (x >> 15)) + second) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def round_stochastic(x, random, dtype: tl.constexpr):
    """Rounds fp32 x to `dtype`, up with the probability of the part that is cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if dtype == tl.bfloat16:
        result = (bits + (random >> 16)) >> 16
    else:
        normal = ((magnitude + (random >> 19)) >> 13) - (112 << 10)
        tiny = magnitude < (113 << 23)
        # In units of the smallest subnormal, plus a uniform number below one, whole units are what is left.
        units = tl.where(tiny, tl.abs(x) * 16777216.0, 0.0) + (random >> 9).to(tl.float32) * 1.1920928955078125e-07
        half = tl.where(tiny, units.to(tl.int32).to(tl.uint32), tl.minimum(normal, 0x7C00))
        result = ((bits >> 16) & 0x8000) | half
    stochastic = result.to(tl.uint16).to(dtype, bitcast=True)
    return tl.where(magnitude < 0x7F800000, stochastic, rounded(x, dtype))


# The rules: new value and moments of each value, with the factors of one weight in one step. The factors are worked out
# in fp64: on the host, or here from numbers on the device, which a captured graph then follows.


@triton.jit
def adamw_factors(lr, weight_decay, step, LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr):
    """Keep, rate and root, as `host_factors` has them."""
    t = step.to(tl.float64)
    correction1 = 1.0 - tl.exp(t * LOG_BETA1)
    correction2 = 1.0 - tl.exp(t * LOG_BETA2)
    keep = (1.0 - lr * weight_decay).to(tl.float32)
    return keep, (lr / correction1).to(tl.float32), (1.0 / tl.sqrt(correction2)).to(tl.float32)


@triton.jit
def adamw(x, g, m, v, keep, rate, root, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * (g * g)
    return keep * x - rate * tl.div_rn(m, tl.sqrt_rn(v) * root + EPS), m, v


@triton.jit
def sgd(x, g, m, lr, weight_decay, MOMENTUM: tl.constexpr):
    """Stochastic gradient descent as `torch.optim.SGD` takes it, without dampening (Sutskever et al. 2013)."""
    direction = g + weight_decay * x
    if MOMENTUM != 0:
        m = MOMENTUM * m + direction
        direction = m
    return x - lr * direction, m


@triton.jit
def place_of(offset, index, columns, weight_stride, mask, BY_COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """Where values of the selected part lie in the weight, int64."""
    row = offset // columns
    column = offset - row * columns
    if BY_COLUMNS:
        return row.to(tl.int64) * weight_stride + tl.load(index + column, mask=mask, other=0)
    else:
        place = tl.load(index + row, mask=mask, other=0) * weight_stride + column
        return tl.max_contiguous(tl.multiple_of(place, VECTOR), VECTOR)


@triton.jit(
    do_not_specialize=["first_position", "first_key", "second_key"],
    do_not_specialize_on_alignment=["lr", "weight_decay", "step", "seed", "grad_scale", "found_inf"],
)
def sparse_optimizer_kernel(
    value, grad, first_moment, second_moment, weight, index, size, columns, weight_stride,
    lr, weight_decay, step, seed, grad_scale, found_inf,
    factor, other_factor, last_factor, first_key, second_key, first_position,
    STOCHASTIC: tl.constexpr, BY_COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
    ADAMW: tl.constexpr, SETTINGS: tl.constexpr, LOG_BETAS: tl.constexpr,
):  # fmt: skip
    """value, grad, moments: fp32 [size]; value is None where the weight holds the values, as are moments not kept.

    lr, weight_decay, step, seed: one number each on the device; without lr the factors and keys are given.
    """
    if found_inf is not None:  # noqa: SIM102, known when compiled, the next condition is not
        if tl.load(found_inf) != 0:
            return
    if lr is not None:
        rate = tl.load(lr)
        decay = tl.load(weight_decay)
        if ADAMW:
            factor, other_factor, last_factor = adamw_factors(
                rate, decay, tl.load(step), LOG_BETAS[0], LOG_BETAS[1]
            )  # fmt: skip
        else:
            factor = rate.to(tl.float32)
            other_factor = decay.to(tl.float32)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    place = place_of(offset, index, columns, weight_stride, mask, BY_COLUMNS, VECTOR)
    g = tl.load(grad + offset, mask=mask, other=0.0)
    if grad_scale is not None:
        g = g * tl.div_rn(1.0, tl.load(grad_scale))
    if value is None:
        x = widened(tl.load(weight + place, mask=mask, other=0.0))
    else:
        x = tl.load(value + offset, mask=mask, other=0.0)
    m = g
    if first_moment is not None:
        m = tl.load(first_moment + offset, mask=mask, other=0.0)
    if ADAMW:
        v = tl.load(second_moment + offset, mask=mask, other=0.0)
        x, m, v = adamw(x, g, m, v, factor, other_factor, last_factor, SETTINGS[0], SETTINGS[1], SETTINGS[2])
        tl.store(second_moment + offset, v, mask=mask)
    else:
        x, m = sgd(x, g, m, factor, other_factor, SETTINGS[0])
    if first_moment is not None:
        tl.store(first_moment + offset, m, mask=mask)
    if value is not None:
        tl.store(value + offset, x, mask=mask)
    dtype: tl.constexpr = weight.dtype.element_ty
    if STOCHASTIC and dtype != tl.float32:
        if lr is None:
            first = first_key.to(tl.uint32, bitcast=True)
            second = second_key.to(tl.uint32, bitcast=True)
        else:
            first, second = key_of(tl.load(seed), tl.load(step))
        random = random_bits(first, second, offset + first_position)
        tl.store(weight + place, round_stochastic(x, random, dtype), mask=mask)
    else:
        tl.store(weight + place, rounded(x, dtype), mask=mask)


# Launch functions


class Numbers(NamedTuple):
    """One number for each weight, on the host or on the device."""

    lr: Tensor
    weight_decay: Tensor
    step: Tensor
    seed: Tensor | None

    def check(self) -> None:
        """Raise ValueError unless they are in one place."""
        places = {number.device.type for number in self if number is not None}
        if len(places) > 1:
            raise ValueError(
                "lr, weight_decay, step and seed must be in one place, the CPU or the device of the weights, "
                f"not on {' and '.join(sorted(places))}"
            )


def on_host(numbers: Numbers) -> bool:
    """Whether they can be read without waiting for the device."""
    return numbers.lr.device.type == "cpu"


def host_factors(
    adamw: bool, settings: Sequence[float], lr: float, weight_decay: float, step: int
) -> tuple[float, float, float]:
    """Of AdamW value = keep * value - rate * exp_avg / (root * sqrt(exp_avg_sq) + eps); of SGD rate and decay."""
    if not adamw:
        return lr, weight_decay, 0.0
    correction1, correction2 = 1 - settings[0] ** step, 1 - settings[1] ** step
    return 1 - lr * weight_decay, lr / correction1, 1 / math.sqrt(correction2)


def host_keys(seed: int, step: int) -> tuple[int, int]:
    """As `key_of`, in signed numbers of 32 bits."""
    z = (seed + step * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    z ^= z >> 31
    first, second = ((half ^ 2**31) - 2**31 for half in (z & MASK32, z >> 32))
    return first, second


@dataclass(frozen=True)
class Part:
    """Neighboring rows of the selected part of one weight."""

    selected: list[Tensor | None]
    """Master values, gradient and the two moments."""
    weight: Tensor
    index: Tensor
    by_columns: bool
    first_position: int

    def launch(self, *arguments: Any) -> None:
        """One launch; the arguments are those of the kernel from `lr` on, without what is known here."""
        *scalars, stochastic, adamw, settings, log_betas = arguments
        rows, columns = self.selected[1].shape  # type: ignore[union-attr]
        stride = self.weight.shape[1]
        row_bytes = (self.weight.data_ptr(), stride * self.weight.element_size())
        whole = columns % VECTOR == 0 and all(x % (VECTOR * self.weight.element_size()) == 0 for x in row_bytes)
        vector = VECTOR if whole and not self.by_columns else 1
        sparse_optimizer_kernel[(triton.cdiv(rows * columns, BLOCK),)](
            *self.selected, self.weight, self.index, rows * columns, columns, stride, *scalars, self.first_position,
            stochastic, self.by_columns, vector, BLOCK, adamw, settings, log_betas,
            **options(THREADS) | {"enable_fp_fusion": False},
        )  # fmt: skip


def parts_of(selected: list[Tensor | None], weight: Tensor, index: Tensor, by_columns: bool) -> Iterator[Part]:
    """The selected part of one weight, in pieces whose positions can be counted in 32 bits; none where it is empty."""
    grad = selected[1]
    assert grad is not None
    rows, columns = grad.shape
    if rows * columns <= LARGEST:
        if rows * columns:
            yield Part(selected, weight, index, by_columns, 0)
        return
    most = max(1, LARGEST // columns)
    for first in range(0, rows, most):
        piece = slice(first, first + most)
        own = [None if tensor is None else tensor[piece] for tensor in selected]
        position = (first * columns + 2**31) % 2**32 - 2**31
        where = (weight[piece], index) if by_columns else (weight, index[piece])
        yield Part(own, *where, by_columns, position)


def _step(
    adamw: bool,
    settings: tuple[float, ...],
    selected: Sequence[Sequence[Tensor]],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    seed: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    numbers = Numbers(lr, weight_decay, step, seed)
    numbers.check()
    host = [[] if number is None else number.tolist() for number in numbers] if on_host(numbers) else []
    log_betas = tuple(math.log(beta) if beta else -math.inf for beta in settings[:2]) if adamw else None
    with on_device(weights[0]):
        for i, (weight, index) in enumerate(zip(weights, indices, strict=True)):
            if not host:
                own = [None if number is None else number[i : i + 1] for number in numbers]
                factors, keys = (0.0, 0.0, 0.0), (0, 0)
            else:
                own = [None] * 4
                factors = host_factors(adamw, settings, *(number[i] for number in host[:3]))
                keys = (0, 0) if seed is None else host_keys(host[3][i], host[2][i])
            given = [tensors[i] if tensors else None for tensors in selected]
            for part in parts_of(given, weight, index.contiguous(), dims[i] == 1):
                part.launch(
                    *own, grad_scale, found_inf, *factors, *keys, seed is not None, adamw, settings, log_betas
                )  # fmt: skip


def sparse_adamw(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    *others: Any,
) -> None:
    """One step of AdamW.

    Args:
        values, grads, exp_avgs, exp_avg_sqs: float32, shaped as the selected part of each weight; values may be empty.
        weights: contiguous with two dimensions.
        indices: int64, sorted, unique, in range (not checked).
        dims: 0 for rows, 1 for columns.
        others: lr, weight_decay, step, seed, grad_scale and found_inf, as `clue_fast.ops.sparse_optimizer.Arguments`
            describes them; then beta1, beta2 and eps.
    """
    *numbers, beta1, beta2, eps = others
    selected = values, grads, exp_avgs, exp_avg_sqs
    _step(True, (beta1, beta2, eps), selected, weights, indices, dims, *numbers)


def sparse_sgd(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    *others: Any,
) -> None:
    """One step of stochastic gradient descent; as sparse_adamw, with momenta (or an empty list) and a momentum."""
    *numbers, momentum = others
    _step(False, (momentum,), (values, grads, momenta, []), weights, indices, dims, *numbers)
