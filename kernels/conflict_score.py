"""Scores of the channels of all sites from their statistics, in one launch.

Everything is float64 inside. The closed forms stand in `closed_form`; `write_scores` reads what they need of some
channels and writes their scores, here and in the second stage of channel_statistics, which has just added to it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device, options

BLOCK = 256
THREADS = 128


# Criterion -> field of the first sum that it reads, and whether that is one of the gradient statistics.
READS = {
    "difference": (0, False),
    "signed_difference": (0, False),
    "welch": (0, False),
    "ratio": (2, False),
    "attribution": (1, True),
    "forget_attribution": (1, True),
}


@triton.jit
def closed_form(first, second, count, other_first, other_second, other_count, CRITERION: tl.constexpr):
    """Score, float64, from two sums and the token count of the forget group and of the retain group.

    "ratio": first = magnitude_sum. "attribution" and "forget_attribution": first = product_magnitude_sum. The others:
    first = sum, second = square_sum, which is read with them only.
    """
    mean = first / count
    other_mean = other_first / other_count
    if CRITERION == "ratio":
        return mean / (other_mean + 0.01)
    elif CRITERION == "attribution":
        return mean - other_mean
    elif CRITERION == "forget_attribution":
        return mean
    else:
        variance = second / count - mean * mean
        other_variance = other_second / other_count - other_mean * other_mean
        variance = tl.where(variance < 0, 0.0, variance)  # NaN stays NaN
        other_variance = tl.where(other_variance < 0, 0.0, other_variance)
        if CRITERION == "welch":
            square_error = variance / tl.maximum(count - 1.0, 1.0)
            square_error += other_variance / tl.maximum(other_count - 1.0, 1.0)
            square_error = tl.where(square_error < 1e-24, 1e-24, square_error)
            return tl.abs(mean - other_mean) / tl.sqrt(square_error)
        else:
            score = (mean - other_mean) / tl.sqrt(0.5 * (variance + other_variance) + 1e-12)
            if CRITERION == "signed_difference":
                return score
            else:
                return tl.abs(score)


@triton.jit
def write_scores(
    statistics, group_stride, field_stride, forget_count, retain_count, out, channel, mask, CRITERION: tl.constexpr
):  # fmt: skip
    """Scores of some channels. statistics: the first of the two sums that the criterion reads."""
    forget = statistics + channel
    retain = forget + group_stride
    forget_first = tl.load(forget, mask=mask, other=0.0)
    retain_first = tl.load(retain, mask=mask, other=0.0)
    forget_second = forget_first
    retain_second = retain_first
    if CRITERION == "difference" or CRITERION == "signed_difference" or CRITERION == "welch":
        forget_second = tl.load(forget + field_stride, mask=mask, other=0.0)
        retain_second = tl.load(retain + field_stride, mask=mask, other=0.0)
    score = closed_form(
        forget_first, forget_second, forget_count, retain_first, retain_second, retain_count, CRITERION
    )  # fmt: skip
    tl.store(out + channel, score.to(tl.float32), mask=mask)


@triton.jit
def site_of(channel, offsets, sites, STEPS: tl.constexpr):
    """Index of the site of each channel: the last one whose offset is not above it, by bisection."""
    site = tl.zeros_like(channel)
    for step in tl.static_range(STEPS):
        later = site + (1 << (STEPS - 1 - step))
        offset = tl.load(offsets + later, mask=later < sites, other=0)
        site = tl.where((later < sites) & (offset <= channel), later, site)
    return site


@triton.jit
def conflict_score_fwd_kernel(
    statistics, group_stride, field_stride, count, count_stride, offsets, out, sites, channels,
    CRITERION: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """statistics: the first of the two sums that the criterion reads, the second is one field further on."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    site = site_of(channel, offsets, sites, STEPS)
    forget_count = tl.load(count + site, mask=mask, other=1).to(tl.float64)
    retain_count = tl.load(count + count_stride + site, mask=mask, other=1).to(tl.float64)
    write_scores(
        statistics, group_stride, field_stride, forget_count, retain_count, out, channel, mask, CRITERION
    )  # fmt: skip


# Launch function


def conflict_score(
    statistics: torch.Tensor,
    gradient_statistics: torch.Tensor | None,
    count: torch.Tensor,
    offsets: torch.Tensor,
    criterion: str,
    out: torch.Tensor,
) -> None:
    """Scores of all channels; group 1 is the forget group, group 2 the retain group.

    Args:
        statistics: float64 [G, 5, channels], last stride 1, G at least 2; see channel_statistics.
        gradient_statistics: float64 [G, 3, channels], read by the attributions only.
        count: int64 [G, sites], tokens counted; a count of 0 makes the scores of its site NaN.
        offsets: int64 [sites + 1], where the channels of each site begin and the last one's end.
        criterion: one of READS; the formulas are in `clue_fast.ops.conflict_score`.
        out: float32 [channels], written.
    """
    channels = out.numel()
    if channels == 0:
        return
    field, of_gradients = READS[criterion]
    source = gradient_statistics if of_gradients else statistics
    assert source is not None
    sites = offsets.numel() - 1
    with on_device(out):
        conflict_score_fwd_kernel[(triton.cdiv(channels, BLOCK),)](
            source[0, field], source.stride(0), source.stride(1), count, count.stride(0), offsets, out,
            sites, channels, criterion, sites.bit_length(), BLOCK, **options(THREADS),
        )  # fmt: skip
