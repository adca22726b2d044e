"""Statistics of every channel by token group, of any tensor [tokens, channels], in two stages.

First stage: a program walks over a run of up to 256 tokens of 128 channels. Each thread adds the tokens it sees
to sums in its registers (fp32, or fp64 of fp64 values, such as norms of heads); at the end the program folds its
threads and writes one partial row per field and group. Second stage: one launch adds the partial rows to the float64
accumulators, always in the same order and without atomics, so that the same input gives the same bits.

A program keeps one set of sums when the tokens of its run belong to one group, two when they belong to two. It
reads its tokens again only when they span more than two group numbers. Partial rows are written for the range of
groups that a run holds, which is noted in `bounds`; the second stage skips the others.

Used alone for MLPs that are not gated, and by gated_activation, which adds its output to the sums as it writes it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .arithmetic import widened
from .conflict_score import READS, write_scores
from .launch import INTERPRETED, on_device, options

FIELDS = 5  # sum, square_sum, magnitude_sum, magnitude_max, active_count
GRADIENT_FIELDS = 3  # product_sum, product_magnitude_sum, product_square_sum
MAXIMUM = 3  # the one field that is a maximum
SUMMED = {
    (FIELDS, "all"): slice(0, 5),
    (FIELDS, "moments"): slice(0, 2),
    (FIELDS, "magnitude"): slice(2, 3),
    (GRADIENT_FIELDS, "all"): slice(0, 3),
    (GRADIENT_FIELDS, "magnitude"): slice(1, 2),
}
"""Which fields a set of sums is, by the number of all."""
_MAXIMUM: tl.constexpr = tl.constexpr(MAXIMUM)

CHANNELS = 128  # a program's channels: 16-byte loads for 16 lanes in half precision, for 32 lanes in fp32
THREADS = 2048 if INTERPRETED else 128  # the time of the interpreter is the number of its tiles
RUN = 256  # the most tokens that are summed in fp32
SHORTEST_RUN = RUN if INTERPRETED else 32
PROGRAMS = 1024  # with fewer programs than this the runs get shorter, so that a short input fills a GPU too
FOLD_RUNS = 32  # of the second stage: partial rows that a program loads at once
FOLD_CHANNELS = 128 if INTERPRETED else 32


# First stage: one set of sums is a tuple with one tensor [rows, channels] per field.


@triton.jit
def no_sums(FIELDS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, dtype: tl.constexpr = tl.float32):
    """Sums of no token: a tuple of FIELDS zeros [ROWS, CHANNELS], fp32, or fp64 of fp64 values."""
    zero = tl.zeros((ROWS, CHANNELS), dtype)
    if FIELDS == 1:  # noqa: SIM116, the kernel knows no dictionaries
        return (zero,)
    elif FIELDS == 2:
        return zero, zero
    elif FIELDS == 3:
        return zero, zero, zero
    else:
        return zero, zero, zero, zero, zero


@triton.jit
def add_activations(sums, a, member):
    """Adds the tokens of one group to its sums.

    a: fp32 or fp64 [DEPTH, ROWS, CHANNELS]; member: [DEPTH, ROWS, 1], which tokens count. They are picked with `where`,
    since 0 times the NaN of a token outside the group would be NaN.
    """
    a = tl.where(member, a, 0.0)
    magnitude = tl.abs(a)
    return (
        sums[0] + tl.sum(a, 0),
        sums[1] + tl.sum(a * a, 0),
        sums[2] + tl.sum(magnitude, 0),
        tl.maximum(sums[3], tl.max(magnitude, 0)),
        sums[4] + tl.sum((a > 0).to(tl.float32), 0),
    )


@triton.jit
def add_moments(sums, a, member):
    """The same of the sum and the sum of squares alone."""
    a = tl.where(member, a, 0.0)
    return sums[0] + tl.sum(a, 0), sums[1] + tl.sum(a * a, 0)


@triton.jit
def add_magnitudes(sums, a, member):
    """The same of the sum of magnitudes alone."""
    return (sums[0] + tl.sum(tl.abs(tl.where(member, a, 0.0)), 0),)


@triton.jit
def add_products(sums, p, member):
    """Adds p = a * dL/da of the tokens of one group to its sums; shapes as in add_activations."""
    p = tl.where(member, p, 0.0)
    return sums[0] + tl.sum(p, 0), sums[1] + tl.sum(tl.abs(p), 0), sums[2] + tl.sum(p * p, 0)


@triton.jit
def group_bounds(group, bounds, run, block, start, stop, GROUPS: tl.constexpr, RUN: tl.constexpr):
    """Lowest and highest group among the tokens start .. stop - 1 of a run, also noted in bounds [runs, 2].

    (1, 0) where no token counts. With one group it is always (1, 1).
    """
    if GROUPS == 1:
        low = 1
        high = 1
    else:
        token = start + tl.arange(0, RUN)
        member = tl.load(group + token, mask=token < stop, other=0).to(tl.int32)
        counted = (member >= 1) & (member <= GROUPS)
        high = tl.max(tl.where(counted, member, 0), 0)
        low = tl.minimum(tl.min(tl.where(counted, member, GROUPS), 0), tl.maximum(high, 1))
    tl.store(bounds + 2 * run, low, mask=block == 0)
    tl.store(bounds + 2 * run + 1, high, mask=block == 0)
    return low, high


@triton.jit
def store_sums(sums, partial, run, group, channel, channels, GROUPS: tl.constexpr, FIELDS: tl.constexpr):
    """Folds the rows of the sums and writes them to partial [runs, GROUPS, FIELDS, channels]."""
    row = partial + (run.to(tl.int64) * GROUPS + group - 1) * FIELDS * channels
    for field in tl.static_range(FIELDS):
        folded = tl.max(sums[field], 0) if field == _MAXIMUM else tl.sum(sums[field], 0)
        tl.store(row + field * channels + channel, folded, mask=channel < channels)


@triton.jit
def tile_index(start, stop, channel, channels, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    """Tokens [DEPTH, ROWS, 1], channels [1, 1, CHANNELS] and the mask of a tile.

    The leading dimension lies within a thread: each thread has DEPTH loads of 16 bytes in flight.
    """
    token = start + tl.arange(0, DEPTH)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    column = channel[None, None, :]
    return token, column, (token < stop) & (column < channels)


@triton.jit
def load_tile(x, stride, token, column, mask):
    """x[token, column] in fp32, or fp64."""
    return widened(tl.load(x + token.to(tl.int64) * stride + column, mask=mask, other=0.0))


@triton.jit
def tile_group(group, start, stop, DEPTH: tl.constexpr, ROWS: tl.constexpr):
    """Group of each token of a tile, [DEPTH, ROWS, 1]; loaded in two dimensions, once a token and not a channel."""
    token = start + tl.arange(0, DEPTH)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    return tl.load(group + token, mask=token < stop, other=0).to(tl.int32)[:, :, None]


@triton.jit
def channel_statistics_pass(
    x, grad, x_stride, grad_stride, group, partial, run, first, start, stop, channel, channels,
    GROUPS: tl.constexpr, FIELDS: tl.constexpr, SETS: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One walk over the tokens of a run for the groups first .. first + SETS - 1.

    It sums x, or with FIELDS == 3 the products x * grad.
    """
    dtype: tl.constexpr = partial.dtype.element_ty
    one = no_sums(FIELDS, ROWS, CHANNELS, dtype)
    two = no_sums(FIELDS, ROWS, CHANNELS, dtype)
    for at in range(start, stop, DEPTH * ROWS):
        token, column, mask = tile_index(at, stop, channel, channels, DEPTH, ROWS)
        member = tile_group(group, at, stop, DEPTH, ROWS)
        value = load_tile(x, x_stride, token, column, mask)
        if FIELDS == 3:
            value = value * load_tile(grad, grad_stride, token, column, mask)
            one = add_products(one, value, member == first)
            if SETS == 2:
                two = add_products(two, value, member == first + 1)
        else:
            one = add_activations(one, value, member == first)
            if SETS == 2:
                two = add_activations(two, value, member == first + 1)
    store_sums(one, partial, run, first, channel, channels, GROUPS, FIELDS)
    if SETS == 2:
        store_sums(two, partial, run, first + 1, channel, channels, GROUPS, FIELDS)


@triton.jit
def channel_statistics_fwd_kernel(
    x, grad, x_stride, grad_stride, group, partial, bounds, tokens, channels,
    GROUPS: tl.constexpr, FIELDS: tl.constexpr, RUN: tl.constexpr,
    DEPTH: tl.constexpr, ROWS: tl.constexpr, LANE: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """First stage. x, grad: [tokens, channels] (grad is read with FIELDS == 3 only); group: int8 [tokens]."""
    blocks = tl.cdiv(channels, CHANNELS)
    run = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    start = run * RUN
    stop = tl.minimum(start + RUN, tokens)
    channel = block * CHANNELS + tl.max_contiguous(tl.arange(0, CHANNELS), LANE)
    low, high = group_bounds(group, bounds, run, block, start, stop, GROUPS, RUN)
    for first in range(low, high + 1, 2):
        if GROUPS == 1:  # noqa: SIM114, known when compiled, the next condition is not
            channel_statistics_pass(
                x, grad, x_stride, grad_stride, group, partial, run, first, start, stop, channel, channels,
                GROUPS, FIELDS, 1, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip
        elif first == high:
            channel_statistics_pass(
                x, grad, x_stride, grad_stride, group, partial, run, first, start, stop, channel, channels,
                GROUPS, FIELDS, 1, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip
        else:
            channel_statistics_pass(
                x, grad, x_stride, grad_stride, group, partial, run, first, start, stop, channel, channels,
                GROUPS, FIELDS, 2, DEPTH, ROWS, CHANNELS,
            )  # fmt: skip


# Second stage. At its end a program has all sums of its channels: with a CRITERION it also writes their scores.


@triton.jit
def add_partial(
    totals, partial, bounds, group, start, runs, channel, channels,
    GROUPS: tl.constexpr, FIELDS: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Adds the partial rows of RUNS runs to totals, a tuple with one float64 [CHANNELS] per field."""
    run = start + tl.arange(0, RUNS)
    low = tl.load(bounds + 2 * run, mask=run < runs, other=1)
    high = tl.load(bounds + 2 * run + 1, mask=run < runs, other=0)
    mask = ((low <= group) & (group <= high))[:, None] & (channel < channels)[None, :]
    row = partial + ((run.to(tl.int64) * GROUPS + group - 1) * FIELDS * channels)[:, None] + channel[None, :]
    sum0 = totals[0] + tl.sum(tl.load(row, mask=mask, other=0.0).to(tl.float64), 0)
    if FIELDS == 1:
        return (sum0,)
    else:
        sum1 = totals[1] + tl.sum(tl.load(row + channels, mask=mask, other=0.0).to(tl.float64), 0)
        if FIELDS == 2:
            return sum0, sum1
        else:
            sum2 = totals[2] + tl.sum(tl.load(row + 2 * channels, mask=mask, other=0.0).to(tl.float64), 0)
            if FIELDS == 3:
                return sum0, sum1, sum2
            else:
                largest = tl.max(tl.load(row + 3 * channels, mask=mask, other=0.0), 0).to(tl.float64)
                sum4 = totals[4] + tl.sum(tl.load(row + 4 * channels, mask=mask, other=0.0).to(tl.float64), 0)
                return sum0, sum1, sum2, tl.maximum(totals[3], largest), sum4


@triton.jit
def channel_statistics_fold_kernel(
    partial, bounds, statistics, group_stride, field_stride, runs, channels,
    count, count_stride, source, source_group_stride, source_field_stride, scores,
    GROUPS: tl.constexpr, FIELDS: tl.constexpr, RUNS: tl.constexpr, CHANNELS: tl.constexpr, CRITERION: tl.constexpr,
):  # fmt: skip
    """Second stage: adds partial [runs, GROUPS, FIELDS, channels] to statistics [GROUPS, FIELDS, channels].

    With a CRITERION it writes scores from source, the first sum that it reads, of statistics or of other accumulators.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mask = channel < channels
    row = statistics + channel
    for group in range(1, GROUPS + 1):
        zero = tl.zeros((CHANNELS,), tl.float64)
        if FIELDS == 1:
            totals = (zero,)
        elif FIELDS == 2:
            totals = (zero, zero)
        elif FIELDS == 3:
            totals = (zero, zero, zero)
        else:
            totals = (zero, zero, zero, zero, zero)
        for start in range(0, runs, RUNS):
            totals = add_partial(
                totals, partial, bounds, group, start, runs, channel, channels, GROUPS, FIELDS, RUNS
            )  # fmt: skip
        for field in tl.static_range(FIELDS):
            cell = row + field * field_stride
            before = tl.load(cell, mask=mask, other=0.0)
            after = tl.maximum(before, totals[field]) if field == _MAXIMUM else before + totals[field]
            tl.store(cell, after, mask=mask)
        row += group_stride
    if CRITERION != "":
        tl.debug_barrier()  # what was stored is read again, should other threads of this program have stored it
        forget_count = tl.load(count).to(tl.float64)
        retain_count = tl.load(count + count_stride).to(tl.float64)
        write_scores(
            source, source_group_stride, source_field_stride, forget_count, retain_count, scores, channel, mask,
            CRITERION,
        )  # fmt: skip


# Launch functions


def run_length(tokens: int, channels: int) -> int:
    """Tokens a program sums: RUN, and down to SHORTEST_RUN while there are fewer than PROGRAMS programs."""
    blocks = triton.cdiv(channels, CHANNELS)
    length = RUN
    while length > SHORTEST_RUN and triton.cdiv(tokens, length) * blocks < PROGRAMS:
        length //= 2
    return length


def tile(dtype: torch.dtype, inputs: int, groups: int = 1) -> tuple[int, int, int]:
    """Shape of a tile: its depth, its rows, and the lane, which is the neighboring channels of a thread.

    A thread loads 16 bytes of a row at once, and of so many rows that 64 bytes of all inputs are under way, but at
    most 16 values of each. The sums of its channels stay in registers; with two sets of them it loads 4 channels at
    once and at most 8 values, since 16 take 168 registers instead of 80 with Triton 3.9, and spill with 3.6.
    """
    lane = min(16 // dtype.itemsize, 8 if groups == 1 else 4)
    depth = min(64 // (inputs * lane * dtype.itemsize), (16 if groups == 1 else 8) // lane)
    return 1 << depth.bit_length() - 1, THREADS * lane // CHANNELS, lane


class Reduction:
    """Scratch space and second stage of one reduction.

    Args:
        group: int8 [tokens].
        statistics: float64 [groups, fields, channels], last stride 1, updated by `fold`.
        sums: "all", or fields of them that are summed alone, "moments" or "magnitude"; the others stay as they are.
        criterion: "", or one of conflict_score, of which `fold` then writes the scores.
        count: int64 [groups, 1], tokens counted.
        source: accumulators that the criterion reads, if others than statistics.
        scores: float32 [channels].
        dtype: in which runs are summed.
    """

    def __init__(
        self,
        group: torch.Tensor,
        statistics: torch.Tensor,
        criterion: str = "",
        count: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        scores: torch.Tensor | None = None,
        *,
        sums: str = "all",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.statistics, self.criterion = statistics[:, SUMMED[statistics.shape[1], sums]], criterion
        read = statistics if source is None else source
        first = read[0, READS[criterion][0]] if criterion else None
        stride = 0 if count is None else count.stride(0)
        self.scoring = count, stride, first, read.stride(0), read.stride(1), scores
        self.groups, self.fields, self.channels = self.statistics.shape
        self.run_length = run_length(group.shape[0], self.channels)
        self.runs = triton.cdiv(group.shape[0], self.run_length)
        shape = (self.runs, self.groups, self.fields, self.channels)
        self.partial = torch.empty(shape, dtype=dtype, device=group.device)
        self.bounds = torch.empty((self.runs, 2), dtype=torch.int32, device=group.device)

    @property
    def grid(self) -> tuple[int]:
        """Programs of the first stage."""
        return (self.runs * triton.cdiv(self.channels, CHANNELS),)

    def fold(self) -> None:
        """Add the partial rows to the statistics."""
        channel_statistics_fold_kernel[(triton.cdiv(self.channels, FOLD_CHANNELS),)](
            self.partial, self.bounds, self.statistics, self.statistics.stride(0), self.statistics.stride(1),
            self.runs, self.channels, *self.scoring,
            self.groups, self.fields, FOLD_RUNS, FOLD_CHANNELS, self.criterion, **options(THREADS),
        )  # fmt: skip


def _reduce(
    x: torch.Tensor, grad: torch.Tensor, inputs: int, group: torch.Tensor, statistics: torch.Tensor, *scoring: Any
) -> None:
    if x.numel() == 0:
        return
    tokens, channels = x.shape
    with on_device(x):
        wide = x.dtype == torch.float64
        reduction = Reduction(group, statistics, *scoring, dtype=x.dtype if wide else torch.float32)
        channel_statistics_fwd_kernel[reduction.grid](
            x, grad, x.stride(0), grad.stride(0), group, reduction.partial, reduction.bounds,
            tokens, channels, reduction.groups, reduction.fields, reduction.run_length,
            *tile(x.dtype, inputs, reduction.groups), CHANNELS, **options(THREADS),
        )  # fmt: skip
        reduction.fold()


def channel_statistics(x: torch.Tensor, group: torch.Tensor, statistics: torch.Tensor, *scoring: Any) -> None:
    """Adds x to the statistics of each token's group.

    Args:
        x: [tokens, channels], float32, bfloat16, float16 or float64, last stride 1.
        group: int8 [tokens]; 0 is not counted, g counts into row g - 1, numbers above G are ignored.
        statistics: float64 [G, 5, channels], last stride 1: sum, square_sum, magnitude_sum, magnitude_max,
            active_count (active: x > 0); updated in place. A NaN reaches the sums, not the maximum.
        scoring: criterion, count, source and scores of Reduction, to write scores as well.
    """
    _reduce(x, x, 1, group, statistics, *scoring)


def channel_attribution(
    x: torch.Tensor, grad: torch.Tensor, group: torch.Tensor, gradient_statistics: torch.Tensor, *scoring: Any
) -> None:
    """Adds p = x * grad to the gradient statistics of each token's group.

    Args:
        x, grad: [tokens, channels], float32, bfloat16, float16 or float64, last stride 1.
        group: int8 [tokens], as in channel_statistics.
        gradient_statistics: float64 [G, 3, channels], last stride 1: product_sum, product_magnitude_sum,
            product_square_sum; updated in place.
        scoring: as in channel_statistics.
    """
    _reduce(x, grad, 2, group, gradient_statistics, *scoring)
