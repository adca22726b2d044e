"""h = act(gate) * up, forward and backward in one pass each, with statistics of h from registers.

All arithmetic is fp32 and rounded once. Recording uses the two stages of channel_statistics: while a program
writes its part of h, it adds h, as rounded, to sums in its registers and leaves one partial row per field and
group; the second stage folds these into the float64 accumulators. Nothing of the size of h is read again, unless
256 neighboring tokens span more than two group numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .arithmetic import exp2, reciprocal, rounded, widened
from .channel_statistics import (
    CHANNELS,
    THREADS,
    Reduction,
    add_activations,
    add_magnitudes,
    add_moments,
    add_products,
    group_bounds,
    load_tile,
    no_sums,
    store_sums,
    tile,
    tile_group,
    tile_index,
)
from .launch import on_device, options


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), fp32."""
    return reciprocal(1.0 + exp2(x * -1.4426950408889634))


@triton.jit
def sigmoid_and_complement(x):
    """sigmoid(x) and 1 - sigmoid(x), fp32, each without cancellation."""
    e = exp2(x * -1.4426950408889634)
    s = reciprocal(1.0 + e)
    return s, tl.where(x > 0, e * s, 1.0 - s)


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """act(g), fp32. tanh is written as a sigmoid, 1 + tanh(z) = 2 sigmoid(2 z), which every target has."""
    if ACTIVATION == "silu":
        return g * sigmoid(g)
    elif ACTIVATION == "gelu_tanh":
        return g * sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "relu2":
        positive = tl.where(g <= 0, 0.0, g)  # NaN stays NaN
        return positive * positive
    else:
        return tl.where(g <= 0, 0.0, g)


@triton.jit
def activate_with_slope(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative, fp32."""
    if ACTIVATION == "silu":
        s, complement = sigmoid_and_complement(g)
        return g * s, s * (1.0 + g * complement)
    elif ACTIVATION == "gelu_tanh":
        s, complement = sigmoid_and_complement(1.5957691216057308 * (g + 0.044715 * g * g * g))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        return g * s, s + g * s * complement * inner
    elif ACTIVATION == "gelu":
        cumulative = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cumulative, cumulative + g * 0.3989422804014327 * exp2(-0.7213475204444817 * g * g)
    elif ACTIVATION == "relu2":
        positive = tl.where(g <= 0, 0.0, g)  # NaN stays NaN
        return positive * positive, 2.0 * positive
    else:
        return tl.where(g <= 0, 0.0, g), tl.where(g <= 0, 0.0, 1.0)


@triton.jit
def store_tile(x, stride, token, column, mask, value):
    """x[token, column] = value, which has the dtype of x."""
    tl.store(x + token.to(tl.int64) * stride + column, value, mask=mask)


# Forward


@triton.jit
def gated_activation_fwd_kernel(
    gate, up, out, gate_stride, up_stride, out_stride, tokens, channels,
    ACTIVATION: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of DEPTH * ROWS tokens and CHANNELS channels."""
    blocks = tl.cdiv(channels, CHANNELS)
    start = tl.program_id(0) // blocks * (DEPTH * ROWS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token, column, mask = tile_index(start, tokens, channel, channels, DEPTH, ROWS)
    g = load_tile(gate, gate_stride, token, column, mask)
    u = load_tile(up, up_stride, token, column, mask)
    h = rounded(activate(g, ACTIVATION) * u, out.dtype.element_ty)
    store_tile(out, out_stride, token, column, mask, h)


@triton.jit
def add_fields(sums, a, member, FIELDS: tl.constexpr):
    """Adds the tokens of one group to the sums of all 5 fields, of the 2 moments or of the magnitude."""
    if FIELDS == 5:
        return add_activations(sums, a, member)
    elif FIELDS == 2:
        return add_moments(sums, a, member)
    else:
        return add_magnitudes(sums, a, member)


@triton.jit
def gated_activation_fwd_pass(
    gate, up, out, gate_stride, up_stride, out_stride, group, partial,
    run, first, low, start, stop, channel, channels,
    ACTIVATION: tl.constexpr, GROUPS: tl.constexpr, FIELDS: tl.constexpr, SETS: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One walk over the tokens of a run: sums the groups first .. first + SETS - 1, writes h if first == low."""
    one = no_sums(FIELDS, ROWS, CHANNELS)
    two = no_sums(FIELDS, ROWS, CHANNELS)
    written = tl.where(first == low, stop, start)
    for at in range(start, stop, DEPTH * ROWS):
        token, column, mask = tile_index(at, stop, channel, channels, DEPTH, ROWS)
        member = tile_group(group, at, stop, DEPTH, ROWS)
        g = load_tile(gate, gate_stride, token, column, mask)
        u = load_tile(up, up_stride, token, column, mask)
        h = rounded(activate(g, ACTIVATION) * u, out.dtype.element_ty)
        store_tile(out, out_stride, token, column, mask & (token < written), h)
        a = widened(h)
        one = add_fields(one, a, member == first, FIELDS)
        if SETS == 2:
            two = add_fields(two, a, member == first + 1, FIELDS)
    store_sums(one, partial, run, first, channel, channels, GROUPS, FIELDS)
    if SETS == 2:
        store_sums(two, partial, run, first + 1, channel, channels, GROUPS, FIELDS)


@triton.jit
def gated_activation_record_fwd_kernel(
    gate, up, out, gate_stride, up_stride, out_stride, group, partial, bounds, tokens, channels,
    ACTIVATION: tl.constexpr, GROUPS: tl.constexpr, FIELDS: tl.constexpr, RUN: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Values of h for a run of RUN tokens and CHANNELS channels, and the first stage of its statistics."""
    blocks = tl.cdiv(channels, CHANNELS)
    run = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start = run * RUN
    stop = tl.minimum(start + RUN, tokens)
    channel = block * CHANNELS + tl.max_contiguous(tl.arange(0, CHANNELS), LANE)
    low, high = group_bounds(group, bounds, run, block, start, stop, GROUPS, RUN)
    for first in range(low, tl.maximum(low, high) + 1, 2):
        if GROUPS == 1:  # noqa: SIM114, known when compiled, the next condition is not
            gated_activation_fwd_pass(
                gate, up, out, gate_stride, up_stride, out_stride, group, partial,
                run, first, low, start, stop, channel, channels,
                ACTIVATION, GROUPS, FIELDS, 1, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip
        elif first >= high:
            gated_activation_fwd_pass(
                gate, up, out, gate_stride, up_stride, out_stride, group, partial,
                run, first, low, start, stop, channel, channels,
                ACTIVATION, GROUPS, FIELDS, 1, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip
        else:
            gated_activation_fwd_pass(
                gate, up, out, gate_stride, up_stride, out_stride, group, partial,
                run, first, low, start, stop, channel, channels,
                ACTIVATION, GROUPS, FIELDS, 2, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip


# Backward


@triton.jit
def gated_activation_bwd_kernel(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
    tokens, channels,
    ACTIVATION: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of DEPTH * ROWS tokens and CHANNELS channels."""
    blocks = tl.cdiv(channels, CHANNELS)
    start = tl.program_id(0) // blocks * (DEPTH * ROWS)
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    token, column, mask = tile_index(start, tokens, channel, channels, DEPTH, ROWS)
    d = load_tile(grad, grad_stride, token, column, mask)
    g = load_tile(gate, gate_stride, token, column, mask)
    u = load_tile(up, up_stride, token, column, mask)
    activation, slope = activate_with_slope(g, ACTIVATION)
    d_gate = rounded(d * u * slope, grad_gate.dtype.element_ty)
    d_up = rounded(d * activation, grad_up.dtype.element_ty)
    store_tile(grad_gate, grad_gate_stride, token, column, mask, d_gate)
    store_tile(grad_up, grad_up_stride, token, column, mask, d_up)


@triton.jit
def add_gradient_fields(sums, p, member, FIELDS: tl.constexpr):
    """The same of products, of all 3 fields or of the magnitude."""
    if FIELDS == 3:
        return add_products(sums, p, member)
    else:
        return add_magnitudes(sums, p, member)


@triton.jit
def gated_activation_bwd_pass(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
    group, partial, run, first, low, start, stop, channel, channels,
    ACTIVATION: tl.constexpr, GROUPS: tl.constexpr, FIELDS: tl.constexpr, SETS: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One walk over the tokens of a run: sums h * grad of SETS groups, writes both gradients if first == low."""
    one = no_sums(FIELDS, ROWS, CHANNELS)
    two = no_sums(FIELDS, ROWS, CHANNELS)
    written = tl.where(first == low, stop, start)
    for at in range(start, stop, DEPTH * ROWS):
        token, column, mask = tile_index(at, stop, channel, channels, DEPTH, ROWS)
        member = tile_group(group, at, stop, DEPTH, ROWS)
        d = load_tile(grad, grad_stride, token, column, mask)
        g = load_tile(gate, gate_stride, token, column, mask)
        u = load_tile(up, up_stride, token, column, mask)
        activation, slope = activate_with_slope(g, ACTIVATION)
        d_gate = rounded(d * u * slope, grad_gate.dtype.element_ty)
        d_up = rounded(d * activation, grad_up.dtype.element_ty)
        store_tile(grad_gate, grad_gate_stride, token, column, mask & (token < written), d_gate)
        store_tile(grad_up, grad_up_stride, token, column, mask & (token < written), d_up)
        p = widened(rounded(activation * u, gate.dtype.element_ty)) * d
        one = add_gradient_fields(one, p, member == first, FIELDS)
        if SETS == 2:
            two = add_gradient_fields(two, p, member == first + 1, FIELDS)
    store_sums(one, partial, run, first, channel, channels, GROUPS, FIELDS)
    if SETS == 2:
        store_sums(two, partial, run, first + 1, channel, channels, GROUPS, FIELDS)


@triton.jit
def gated_activation_record_bwd_kernel(
    grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
    group, partial, bounds, tokens, channels,
    ACTIVATION: tl.constexpr, GROUPS: tl.constexpr, FIELDS: tl.constexpr, RUN: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of a run of RUN tokens and CHANNELS channels, and the first stage of the sums of h * grad."""
    blocks = tl.cdiv(channels, CHANNELS)
    run = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start = run * RUN
    stop = tl.minimum(start + RUN, tokens)
    channel = block * CHANNELS + tl.max_contiguous(tl.arange(0, CHANNELS), LANE)
    low, high = group_bounds(group, bounds, run, block, start, stop, GROUPS, RUN)
    for first in range(low, tl.maximum(low, high) + 1, 2):
        if GROUPS == 1:  # noqa: SIM114, known when compiled, the next condition is not
            gated_activation_bwd_pass(
                grad, gate, up, grad_gate, grad_up,
                grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
                group, partial, run, first, low, start, stop, channel, channels,
                ACTIVATION, GROUPS, FIELDS, 1, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip
        elif first >= high:
            gated_activation_bwd_pass(
                grad, gate, up, grad_gate, grad_up,
                grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
                group, partial, run, first, low, start, stop, channel, channels,
                ACTIVATION, GROUPS, FIELDS, 1, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip
        else:
            gated_activation_bwd_pass(
                grad, gate, up, grad_gate, grad_up,
                grad_stride, gate_stride, up_stride, grad_gate_stride, grad_up_stride,
                group, partial, run, first, low, start, stop, channel, channels,
                ACTIVATION, GROUPS, FIELDS, 2, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip


# Launch functions


def _tiles(shape: torch.Size, tile_tokens: int) -> tuple[int]:
    return (triton.cdiv(shape[0], tile_tokens) * triton.cdiv(shape[1], CHANNELS),)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: str) -> None:
    """Writes h = act(gate) * up.

    Args:
        gate, up: [tokens, channels], float32, bfloat16 or float16, last stride 1, any row stride.
        out: as gate; written.
        activation: "silu", "gelu_tanh", "gelu" (erf), "relu" or "relu2".
    """
    if out.numel() == 0:
        return
    depth, rows, _ = tile(gate.dtype, 2)
    with on_device(gate):
        gated_activation_fwd_kernel[_tiles(gate.shape, depth * rows)](
            gate, up, out, gate.stride(0), up.stride(0), out.stride(0), *gate.shape,
            activation, depth, rows, CHANNELS, **options(THREADS),
        )  # fmt: skip


def gated_activation_record(
    gate: torch.Tensor,
    up: torch.Tensor,
    out: torch.Tensor,
    activation: str,
    group: torch.Tensor,
    statistics: torch.Tensor,
    sums: str = "all",
    *scoring: Any,
) -> None:
    """Writes h = act(gate) * up and adds it to the statistics of each token's group.

    Args:
        gate, up, out, activation: as in gated_activation; out must not share memory with gate or up.
        group: int8 [tokens]; 0 is not counted, g counts into row g - 1, numbers above G are ignored.
        statistics: float64 [G, 5, channels], last stride 1, updated in place; see channel_statistics.
        sums: which of its fields, see Reduction.
        scoring: as in channel_statistics.
    """
    if out.numel() == 0:
        return
    with on_device(gate):
        reduction = Reduction(group, statistics, *scoring, sums=sums)
        gated_activation_record_fwd_kernel[reduction.grid](
            gate, up, out, gate.stride(0), up.stride(0), out.stride(0),
            group, reduction.partial, reduction.bounds, *gate.shape,
            activation, reduction.groups, reduction.fields, reduction.run_length,
            *tile(gate.dtype, 2, reduction.groups), CHANNELS, **options(THREADS),
        )  # fmt: skip
        reduction.fold()


def gated_activation_backward(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
    activation: str,
) -> None:
    """Writes the gradients grad * up * act'(gate) and grad * act(gate).

    Args:
        grad, gate, up: [tokens, channels], last stride 1, any row stride.
        grad_gate, grad_up: as gate; written.
        activation: as in gated_activation.
    """
    if grad.numel() == 0:
        return
    depth, rows, _ = tile(gate.dtype, 3)
    with on_device(gate):
        gated_activation_bwd_kernel[_tiles(gate.shape, depth * rows)](
            grad, gate, up, grad_gate, grad_up,
            grad.stride(0), gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0), *gate.shape,
            activation, depth, rows, CHANNELS, **options(THREADS),
        )  # fmt: skip


def gated_activation_backward_record(
    grad: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    grad_gate: torch.Tensor,
    grad_up: torch.Tensor,
    activation: str,
    group: torch.Tensor,
    gradient_statistics: torch.Tensor,
    sums: str = "all",
    *scoring: Any,
) -> None:
    """gated_activation_backward, with p = h * grad added to the gradient statistics of each token's group.

    Args:
        grad, gate, up, grad_gate, grad_up, activation: as in gated_activation_backward; grad_gate and grad_up
            must not share memory with grad, gate or up.
        group: int8 [tokens], as in gated_activation_record.
        gradient_statistics: float64 [G, 3, channels], last stride 1, updated in place; see
            channel_attribution.
        sums: which of its fields, see Reduction.
        scoring: as in channel_statistics.
    """
    if grad.numel() == 0:
        return
    with on_device(gate):
        reduction = Reduction(group, gradient_statistics, *scoring, sums=sums)
        gated_activation_record_bwd_kernel[reduction.grid](
            grad, gate, up, grad_gate, grad_up,
            grad.stride(0), gate.stride(0), up.stride(0), grad_gate.stride(0), grad_up.stride(0),
            group, reduction.partial, reduction.bounds, *gate.shape,
            activation, reduction.groups, reduction.fields, reduction.run_length,
            *tile(gate.dtype, 3, reduction.groups), CHANNELS, **options(THREADS),
        )  # fmt: skip
        reduction.fold()
