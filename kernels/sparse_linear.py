"""Gradient of selected rows or columns of a linear layer's weight: gathers, and a thin product over the tokens.

A program of the product walks over a run of tokens for one tile of the gradient and sums in fp32, with the tensor
cores' own products of 16-bit values and exact ones of fp32 values. Where there are too few tiles to fill a GPU, the
tokens are split into runs of a length that depends on the shapes alone; a second launch adds their partial sums, always
in the same order and without atomics, so that the same input gives the same bits.

The selected columns of the output gradient are loaded through the index, without a copy, where few tiles need them.
Every tile along the input features loads them again, and a column alone fetches 32 bytes for its 2: from
`MOST_INDEXED_TILES` on they are gathered once, [tokens, k], as long as the sum of the loads is the larger cost. That
limit is an estimate from sizes and rates of caches, not measured.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, float32

from .arithmetic import widened
from .launch import INTERPRETED, on_device, options

PROGRAMS = 256  # with fewer tiles than this the tokens are split
SHORTEST_RUN = 256
MOST_INDEXED_TILES = 8
FOLD = 16384 if INTERPRETED else 1024
GATHERED = 16384 if INTERPRETED else 1024  # values of a program that gathers
THREADS = 256
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)


@triton.jit
def sparse_linear_gather_kernel(
    x, index, out, tokens, count, x_stride, out_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """out[t, i] = x[t, index[i]]."""
    blocks = tl.cdiv(count, COLUMNS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    token = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    source = tl.load(index + column, mask=column < count, other=0)
    mask = (token < tokens)[:, None] & (column < count)[None, :]
    value = tl.load(x + token[:, None] * x_stride + source[None, :], mask=mask)
    tl.store(out + token[:, None] * out_stride + column[None, :], value, mask=mask)


@triton.jit
def sparse_linear_bwd_kernel(
    grad, x, index, out, tokens, rows, columns, grad_stride, x_stride, run_stride, row_stride, column_stride, run,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out[row, column] = sum over the tokens of a run of grad[t, index[row]] * x[t, column]; rows without an index."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    source = row
    if index is not None:
        source = tl.load(index + row, mask=row < rows, other=0)
    start = tl.program_id(1) * run
    stop = tl.minimum(start + run, tokens)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(start, stop, TOKENS):
        token = first + tl.arange(0, TOKENS)
        line = token.to(tl.int64)[:, None]
        known = (token < stop)[:, None]
        left = tl.load(grad + line * grad_stride + source[None, :], mask=known & (row < rows)[None, :], other=0.0)
        right = tl.load(x + line * x_stride + column[None, :], mask=known & (column < columns)[None, :], other=0.0)
        if _INTERPRETED or left.dtype != right.dtype:  # the interpreter's own products of bfloat16 are wrong
            left = widened(left)
            right = widened(right)
        total = tl.dot(tl.trans(left), right, total, input_precision="ieee")
    at = out + tl.program_id(1).to(tl.int64) * run_stride
    at += row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * column_stride
    tl.store(at, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def sparse_linear_fold_kernel(partial, out, runs, rows, columns, row_stride, column_stride, BLOCK: tl.constexpr):
    """Adds the partial sums [runs, rows, columns] of the runs, the first one first."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * columns
    total = tl.zeros((BLOCK,), tl.float32)
    for run in range(0, runs):
        total += tl.load(partial + run * size + position, mask=position < size, other=0.0)
    row = position // columns
    tl.store(out + row * row_stride + (position - row * columns) * column_stride, total, mask=position < size)


# Launch functions


class Tile(NamedTuple):
    """What a program of the product sums at a time."""

    rows: int
    columns: int
    tokens: int


LARGEST = Tile(256, 1024, 1024) if INTERPRETED else Tile(64, 128, 32)
LARGEST_FLOAT32 = LARGEST if INTERPRETED else Tile(64, 64, 16)  # products without tensor cores are made in registers
SMALLEST = 16


def tile_of(wide: bool, rows: int, columns: int) -> Tile:
    """For a gradient [rows, columns]."""
    most = LARGEST_FLOAT32 if wide else LARGEST

    def fitting(limit: int, n: int) -> int:
        return min(limit, max(SMALLEST, 1 << (n - 1).bit_length()))

    return Tile(fitting(most.rows, rows), fitting(most.columns, columns), most.tokens)


def run_length(tokens: int, tiles: int, block: int) -> int:
    """Tokens of a run, a multiple of `block`: all of them where there are tiles enough."""
    runs = min(-(-PROGRAMS // tiles), max(1, tokens // SHORTEST_RUN))
    blocks = -(-tokens // (runs * block))
    return max(1, blocks) * block


def sparse_linear_gather(x: Tensor, index: Tensor, out: Tensor) -> None:
    """Writes x[:, index].

    Args:
        x: [tokens, features], float32, bfloat16 or float16, last stride 1.
        index: int64 [k], in range (not checked).
        out: [tokens, k], the dtype of x, last stride 1; written.
    """
    tokens, count = out.shape
    if tokens == 0 or count == 0:
        return
    columns = min(256, triton.next_power_of_2(count))
    rows = GATHERED // columns
    with on_device(x):
        sparse_linear_gather_kernel[(triton.cdiv(tokens, rows) * triton.cdiv(count, columns),)](
            x, index.contiguous(), out, tokens, count, x.stride(0), out.stride(0), rows, columns, **options(THREADS)
        )


def sparse_linear_backward(grad: Tensor, x: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Writes grad[:, index]^T x, summed in fp32; all columns of grad without an index.

    Args:
        grad: [tokens, out_features], float32, bfloat16 or float16, last stride 1.
        x: [tokens, n], last stride 1.
        index: int64 [k], in range (not checked), or None.
        out: float32 [k or out_features, n], any strides; written.
    """
    tokens = grad.shape[0]
    rows, columns = out.shape
    if rows == 0 or columns == 0:
        return
    tile = tile_of(float32 in (grad.dtype, x.dtype), rows, columns)
    across = triton.cdiv(columns, tile.columns)
    if index is not None:
        index = index.contiguous()
        if across > MOST_INDEXED_TILES:
            gathered = grad.new_empty(tokens, rows)
            sparse_linear_gather(grad, index, gathered)
            grad, index = gathered, None
    tiles = triton.cdiv(rows, tile.rows) * across
    run = run_length(tokens, tiles, tile.tokens)
    runs = max(1, triton.cdiv(tokens, run))
    target = out if runs == 1 else out.new_empty(runs, rows, columns)
    with on_device(grad):
        sparse_linear_bwd_kernel[(tiles, runs)](
            grad, x, index, target, tokens, rows, columns, grad.stride(0), x.stride(0), rows * columns,
            *target.stride()[-2:], run, *tile, **options(THREADS),
        )  # fmt: skip
        if runs > 1:
            sparse_linear_fold_kernel[(triton.cdiv(rows * columns, FOLD),)](
                target, out, runs, rows, columns, *out.stride(), FOLD, **options(THREADS)
            )
