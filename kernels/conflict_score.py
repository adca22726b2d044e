"""Scores of the channels of all sites from their statistics, in one launch.

Everything is float64 inside. The closed forms stand in `closed_form`, which takes and returns one value a channel,
so that another kernel that holds the statistics of its channels can write scores too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import on_device, options

BLOCK = 256
THREADS = 128


@triton.jit
def closed_form(first, second, count, other_first, other_second, other_count, CRITERION: tl.constexpr):
    """Score, float64, from two sums and the token count of the forget group and of the retain group.

    "difference": first = sum, second = square_sum. "ratio": first = magnitude_sum. "attribution":
    first = product_magnitude_sum. The second sums are read with "difference" only.
    """
    mean = first / count
    other_mean = other_first / other_count
    if CRITERION == "ratio":
        return mean / (other_mean + 0.01)
    elif CRITERION == "attribution":
        return mean - other_mean
    else:
        variance = second / count - mean * mean
        other_variance = other_second / other_count - other_mean * other_mean
        variance = tl.where(variance < 0, 0.0, variance)  # NaN stays NaN
        other_variance = tl.where(other_variance < 0, 0.0, other_variance)
        return tl.abs(mean - other_mean) / tl.sqrt(0.5 * (variance + other_variance) + 1e-12)


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
    forget = statistics + channel
    retain = forget + group_stride
    forget_first = tl.load(forget, mask=mask, other=0.0)
    retain_first = tl.load(retain, mask=mask, other=0.0)
    forget_second = forget_first
    retain_second = retain_first
    if CRITERION == "difference":
        forget_second = tl.load(forget + field_stride, mask=mask, other=0.0)
        retain_second = tl.load(retain + field_stride, mask=mask, other=0.0)
    score = closed_form(
        forget_first, forget_second, forget_count, retain_first, retain_second, retain_count, CRITERION
    )  # fmt: skip
    tl.store(out + channel, score.to(tl.float32), mask=mask)


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
        gradient_statistics: float64 [G, 3, channels], read by "attribution" only.
        count: int64 [G, sites], tokens counted; a count of 0 makes the scores of its site NaN.
        offsets: int64 [sites + 1], where the channels of each site begin and the last one's end.
        criterion: "difference", |mean_f - mean_r| / sqrt((var_f + var_r) / 2 + 1e-12); "ratio",
            E_f|a| / (E_r|a| + 0.01) (Pochinkov and Schoots 2024); "attribution", E_f|p| - E_r|p|.
        out: float32 [channels], written.
    """
    channels = out.numel()
    if channels == 0:
        return
    source = gradient_statistics if criterion == "attribution" else statistics
    assert source is not None
    field = {"difference": 0, "ratio": 2, "attribution": 1}[criterion]
    sites = offsets.numel() - 1
    with on_device(out):
        conflict_score_fwd_kernel[(triton.cdiv(channels, BLOCK),)](
            source[0, field], source.stride(0), source.stride(1), count, count.stride(0), offsets, out,
            sites, channels, criterion, sites.bit_length(), BLOCK, **options(THREADS),
        )  # fmt: skip
