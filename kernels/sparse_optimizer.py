"""One optimizer step on selected rows or columns of many weights in a few launches, whatever the rule.

The selected part is contiguous in the master values, gradients and moments and walked as one line of values, so that
all of them are read and written 16 bytes at a time, whatever is selected. Rows of the weight are written four values at
a time, columns one by one. The arithmetic is that of csrc/cuda, with every product rounded before it is added, as
PyTorch rounds: what is left out adds up over the steps.

What a launch must know of its weights is a table in memory, copied once a step: a launch for each dtype, direction,
alignment and size to a power of two. Where lr, step and the like are on the device a graph may be captured, which would
not keep the table: then a launch takes one weight by its arguments. A table as an argument, as csrc/cuda has it, would
make Triton compile anew for whatever each of its numbers divides by.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import rounded, widened
from .launch import INTERPRETED, on_device, options

BLOCK = 32768 if INTERPRETED else 1024  # the time of the interpreter is the number of its programs
THREADS = 256
VECTOR = 4
LARGEST = 2**30  # values of a launch: positions are counted in 32 bits
MASK64 = 2**64 - 1
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


# Stochastic rounding. clue_fast/ops/sparse_optimizer.py holds the definition.


@triton.jit
def key_of(seed, step):
    """Two keys of 32 bits of one weight in one step, in one number (splitmix64: Steele, Lea & Flood 2014)."""
    z = seed.to(tl.uint64) + step.to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


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


@triton.jit
def update(
    value, grad, first_moment, second_moment, weight, index, size, columns, weight_stride, first_position,
    factors, keys, grad_scale,
    MASTERS: tl.constexpr, MOMENTS: tl.constexpr, STOCHASTIC: tl.constexpr, BY_COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, SETTINGS: tl.constexpr,
):  # fmt: skip
    """A block of the selected part of one weight. value, grad, moments: fp32 [size].

    AdamW has two moments, SGD with momentum one. Without MASTERS the weight holds the values.
    """
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < size
    place = place_of(offset, index, columns, weight_stride, mask, BY_COLUMNS, VECTOR)
    g = tl.load(grad + offset, mask=mask, other=0.0)
    if grad_scale is not None:
        g = g * tl.div_rn(1.0, tl.load(grad_scale))
    if MASTERS:
        x = tl.load(value + offset, mask=mask, other=0.0)
    else:
        x = widened(tl.load(weight + place, mask=mask, other=0.0))
    m = g
    if MOMENTS > 0:
        m = tl.load(first_moment + offset, mask=mask, other=0.0)
    if MOMENTS == 2:
        v = tl.load(second_moment + offset, mask=mask, other=0.0)
        x, m, v = adamw(x, g, m, v, factors[0], factors[1], factors[2], SETTINGS[0], SETTINGS[1], SETTINGS[2])
        tl.store(second_moment + offset, v, mask=mask)
    else:
        x, m = sgd(x, g, m, factors[0], factors[1], SETTINGS[0])
    if MOMENTS > 0:
        tl.store(first_moment + offset, m, mask=mask)
    if MASTERS:
        tl.store(value + offset, x, mask=mask)
    dtype: tl.constexpr = weight.dtype.element_ty
    if STOCHASTIC and dtype != tl.float32:
        random = random_bits(keys[0], keys[1], offset + first_position)
        tl.store(weight + place, round_stochastic(x, random, dtype), mask=mask)
    else:
        tl.store(weight + place, rounded(x, dtype), mask=mask)


@triton.jit
def pointer(row, FIELD: tl.constexpr, dtype: tl.constexpr, BYTES: tl.constexpr):
    """The address in a field of a table, a multiple of some bytes."""
    return tl.multiple_of(tl.load(row + FIELD).to(tl.pointer_type(dtype)), BYTES)


@triton.jit
def factor(row, FIELD: tl.constexpr):
    """The fp32 number in the lower half of a field of a table."""
    return tl.load(row + FIELD).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def sparse_optimizer_kernel(
    table, grad_scale, found_inf, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    MASTERS: tl.constexpr, MOMENTS: tl.constexpr, STOCHASTIC: tl.constexpr, BY_COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, SETTINGS: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """table: int64 [parts, FIELDS], a row of `Part.row` for each; ALIGNED: all are to 16 bytes, of whole vectors."""
    if found_inf is not None:  # noqa: SIM102, known when compiled, the next condition is not
        if tl.load(found_inf) != 0:
            return
    row = table + tl.program_id(1) * FIELDS
    BYTES: tl.constexpr = 16 if ALIGNED else 4
    size = tl.multiple_of(tl.load(row + 6).to(tl.int32), BYTES // 4)
    if tl.program_id(0) * BLOCK >= size:
        return
    key = tl.load(row + 10).to(tl.uint64)
    update(
        pointer(row, 0, tl.float32, BYTES), pointer(row, 1, tl.float32, BYTES), pointer(row, 2, tl.float32, BYTES),
        pointer(row, 3, tl.float32, BYTES), pointer(row, 4, DTYPE, VECTOR * DTYPE.primitive_bitwidth // 8),
        pointer(row, 5, tl.int64, 8), size, tl.load(row + 7).to(tl.int32), tl.load(row + 8), tl.load(row + 9),
        (factor(row, 11), factor(row, 12), factor(row, 13)), (key.to(tl.uint32), (key >> 32).to(tl.uint32)),
        grad_scale, MASTERS, MOMENTS, STOCHASTIC, BY_COLUMNS, VECTOR, BLOCK, SETTINGS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["first_position"],
    do_not_specialize_on_alignment=["lr", "weight_decay", "step", "seed", "grad_scale", "found_inf"],
)
def sparse_optimizer_captured_kernel(
    value, grad, first_moment, second_moment, weight, index, size, columns, weight_stride, first_position,
    lr, weight_decay, step, seed, grad_scale, found_inf,
    MASTERS: tl.constexpr, MOMENTS: tl.constexpr, STOCHASTIC: tl.constexpr, BY_COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, SETTINGS: tl.constexpr, LOG_BETAS: tl.constexpr,
):  # fmt: skip
    """The same for one weight. lr, weight_decay, step, seed: one number each, on the device."""
    if found_inf is not None:  # noqa: SIM102, known when compiled, the next condition is not
        if tl.load(found_inf) != 0:
            return
    rate = tl.load(lr)
    decay = tl.load(weight_decay)
    t = tl.load(step)
    if MOMENTS == 2:
        factors = adamw_factors(rate, decay, t, LOG_BETAS[0], LOG_BETAS[1])
    else:
        factors = (rate.to(tl.float32), decay.to(tl.float32))
    key = t.to(tl.uint64)
    if STOCHASTIC:
        key = key_of(tl.load(seed), t)
    update(
        value, grad, first_moment, second_moment, weight, index, size, columns, weight_stride, first_position,
        factors, (key.to(tl.uint32), (key >> 32).to(tl.uint32)), grad_scale,
        MASTERS, MOMENTS, STOCHASTIC, BY_COLUMNS, VECTOR, BLOCK, SETTINGS,
    )  # fmt: skip


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

    def of(self, i: int) -> Numbers:
        """Those of one weight, where they are."""
        own = slice(i, i + 1)
        return Numbers(
            self.lr[own], self.weight_decay[own], self.step[own], None if self.seed is None else self.seed[own]
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


def signed(number: int) -> int:
    """64 bits as int64 has them: keys, and addresses on Intel's GPUs, may have the highest one."""
    return (number ^ 2**63) - 2**63


def host_key(seed: int, step: int) -> int:
    """As `key_of`, in a signed number of 64 bits."""
    z = (seed + step * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    z ^= z >> 31
    return signed(z)


@dataclass(frozen=True)
class Part:
    """Neighboring rows of the selected part of one weight."""

    selected: list[Tensor | None]
    """Master values, gradient and the two moments."""
    weight: Tensor
    index: Tensor
    by_columns: bool
    first_position: int

    @cached_property
    def addresses(self) -> list[int]:
        """Of the selected tensors, or 0; of the weight and the index."""
        return [0 if tensor is None else tensor.data_ptr() for tensor in (*self.selected, self.weight, self.index)]

    @cached_property
    def geometry(self) -> tuple[int, int, int, int]:
        """Size, columns, stride of the weight, first position."""
        grad = self.selected[1]
        assert grad is not None
        return grad.numel(), grad.shape[1], self.weight.shape[1], self.first_position

    @property
    def blocks(self) -> int:
        """Programs that it takes."""
        return -(-self.geometry[0] // BLOCK)

    @property
    def vector(self) -> int:
        """Neighbors that lie side by side in the weight too, from a multiple of their size on."""
        _, columns, stride, _ = self.geometry
        if self.by_columns or columns % VECTOR or stride % VECTOR:
            return 1
        return 1 if self.addresses[4] % (VECTOR * self.weight.element_size()) else VECTOR

    @property
    def aligned(self) -> bool:
        """Whether every four values of the selected part are 16 bytes at a multiple of 16."""
        return self.geometry[0] % 4 == 0 and not any(address % 16 for address in self.addresses[:4])

    def row(self, key: int, factors: tuple[float, ...]) -> list[int]:
        """Of a table: addresses, geometry, key and factors, the latter by their bits."""
        return [*map(signed, self.addresses), *self.geometry, key, *struct.unpack("<3i", struct.pack("<3f", *factors))]


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


class Step(NamedTuple):
    """What is the same for all weights, as the kernels take it."""

    masters: bool
    moments: int
    stochastic: bool
    settings: tuple[float, ...]
    grad_scale: Tensor | None
    found_inf: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler: products are rounded before they are added."""
        return options(THREADS) | {"enable_fp_fusion": False}

    def launch_all(self, parts: Iterable[tuple[int, Part]], numbers: Numbers, device: torch.device) -> None:
        """All parts, with numbers on the host, which come with the numbers of their weights."""
        lr, decay, step = numbers.lr.tolist(), numbers.weight_decay.tolist(), numbers.step.tolist()
        keys = [0] * len(step) if numbers.seed is None else [*map(host_key, numbers.seed.tolist(), step)]
        groups: dict[tuple[Any, ...], list[tuple[int, list[int]]]] = {}
        for i, part in parts:
            factors = host_factors(self.moments == 2, self.settings, lr[i], decay[i], step[i])
            kind = part.weight.dtype, part.aligned, part.by_columns, part.vector, (part.blocks - 1).bit_length()
            groups.setdefault(kind, []).append((part.blocks, part.row(keys[i], factors)))
        if not groups:
            return
        table = torch.tensor([row for group in groups.values() for _, row in group])
        if device.type != "cpu":  # from pinned memory the copy waits for nothing
            table = table.pin_memory().to(device, non_blocking=True)
        for (dtype, aligned, by_columns, vector, _), group in groups.items():
            sparse_optimizer_kernel[(max(blocks for blocks, _ in group), len(group))](
                table, self.grad_scale, self.found_inf, DTYPES[dtype], aligned,
                self.masters, self.moments, self.stochastic, by_columns, vector, BLOCK, self.settings, table.shape[1],
                **self.options,
            )  # fmt: skip
            table = table[len(group) :]

    def launch_one(self, part: Part, numbers: Numbers) -> None:
        """One part, with the numbers of its weight on the device."""
        log_betas = tuple(math.log(beta) if beta else -math.inf for beta in self.settings[:2])
        sparse_optimizer_captured_kernel[(part.blocks,)](
            *part.selected, part.weight, part.index, *part.geometry, *numbers, self.grad_scale, self.found_inf,
            self.masters, self.moments, self.stochastic, part.by_columns, part.vector, BLOCK, self.settings, log_betas,
            **self.options,
        )  # fmt: skip


def _step(
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
    masters, moments = bool(selected[0]), sum(map(bool, selected[2:]))
    common = Step(masters, moments, seed is not None, settings, grad_scale, found_inf)
    indices = [index.contiguous() for index in indices]  # kept here until the launch: a table does not

    def parts() -> Iterator[tuple[int, Part]]:
        for i, (weight, index, dim) in enumerate(zip(weights, indices, dims, strict=True)):
            own = [tensors[i] if tensors else None for tensors in selected]
            for part in parts_of(own, weight, index, dim == 1):
                yield i, part

    with on_device(weights[0]):
        if on_host(numbers):
            common.launch_all(parts(), numbers, weights[0].device)
            return
        for i, part in parts():
            common.launch_one(part, numbers.of(i))


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
    _step((beta1, beta2, eps), selected, weights, indices, dims, *numbers)


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
    _step((momentum,), (values, grads, momenta if momentum else [], []), weights, indices, dims, *numbers)
