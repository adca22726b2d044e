"""How the optimizers round into a 16-bit weight: to nearest even from master values, or stochastically."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from clue_fast.ops import sparse_adamw_
from tests.ops.slices import (
    BETAS,
    EPS,
    Layer,
    SgdLayers,
    arguments,
    bits,
    gradients,
    layers,
    outside,
    same,
    step,
    stochastic_step,
    to,
)

OPERATOR = "sparse_optimizer"
MOMENTUM = pytest.mark.parametrize("momentum", [0.0, 0.9])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Every pattern of the upper half, and lower halves below, at and above the middle between two neighbors."""
    upper = torch.arange(2**16, dtype=torch.int64).repeat_interleave(8)
    middle = 0x8000 if dtype == torch.bfloat16 else 0x1000
    lower = torch.tensor([0, 1, middle - 1, middle, middle + 1, 0x2000, 0x3000, 0xFFFF]).repeat(2**16)
    patterns = (upper << 16 | lower) - (upper >> 15 << 32)
    values = patterns.to(torch.int32).view(torch.float32).view(-1, 256)
    shape = (values.shape[0] * 2, 256) if dim == 0 else (values.shape[0], 512)
    one = Layer(torch.zeros(shape, dtype=dtype), torch.arange(1, shape[dim], 2), dim, lr=0.0)
    one.value = values.clone()
    mine = to([one], device)
    step(mine, backend)
    expected = values.to(dtype)
    actual = one.selected().cpu()
    number = ~expected.isnan()
    assert torch.equal(actual.isnan(), expected.isnan())
    # A rate of zero leaves the value, but for the sign of zero.
    assert torch.equal(actual[number], expected[number])
    assert torch.equal(bits(one.value.to(dtype))[number], bits(one.selected())[number])


def test_master_values_collect_what_bfloat16_would_lose(backend: str, device: torch.device) -> None:
    one = Layer(torch.ones(4, 8, dtype=torch.bfloat16), torch.tensor([1, 3]), 0, lr=1e-4, weight_decay=0.0)
    mine = to([one], device)
    for _ in range(100):
        one.step += 1
        sparse_adamw_(*arguments(mine, [torch.ones_like(one.value)]), BETAS, EPS, backend=backend)
    assert torch.allclose(one.value, torch.full_like(one.value, 0.99), rtol=1e-5)
    assert torch.equal(one.selected(), torch.full_like(one.selected(), 0.99))


def random_word(seed: int, step: int, position: int) -> int:
    """The random bits of one element, with Python's integers: splitmix64 for the keys, lowbias32 for the position."""
    z = (seed + step * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    z ^= z >> 31
    x = (position + z) % 2**32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = (((x ^ (x >> 15)) + z // 2**32) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


# From the middle of the normal numbers, and from those in which float16 is subnormal (its smallest is 6e-8).
@pytest.mark.parametrize(
    ("dtype", "start", "lr"),
    [(torch.bfloat16, 1.0, 3e-3), (torch.float16, -1.0, 3e-4), (torch.float16, 1e-5, 2e-8), (torch.float32, 1.0, 1e-3)],
)
@pytest.mark.parametrize("dim", [0, 1])
def test_stochastic_rounding_element_by_element(
    backend: str, device: torch.device, dtype: torch.dtype, start: float, lr: float, dim: int
) -> None:
    """Up in magnitude where the part that is cut off and the random number reach one unit of the dtype."""
    one = Layer(torch.full((23, 37), start).to(dtype), torch.tensor([0, 4, 5, 20]), dim, lr=lr, weight_decay=0.0)
    one.step = 1  # so that the step counts
    to([one], device)
    before, at_start = outside(one), one.selected().double().cpu()
    grads = gradients([one], 0)
    stochastic_step([one], backend, grads, seed=-5)
    g = grads[0].double().cpu()
    m, v = (1 - BETAS[0]) * g, (1 - BETAS[1]) * g**2
    exact = at_start - lr * m / (1 - BETAS[0] ** 2) / ((v / (1 - BETAS[1] ** 2)).sqrt() + EPS)
    assert torch.equal(outside(one), before)
    actual, borderline = one.selected().cpu(), 0
    if dtype == torch.float32:
        assert torch.allclose(actual.double(), exact, rtol=2e-7)
        return
    for row, column in torch.cartesian_prod(*(torch.arange(n) for n in exact.shape)).tolist():
        value = exact[row, column].item()
        mantissa = 7 if dtype == torch.bfloat16 else 10
        lowest = -126 if dtype == torch.bfloat16 else -14
        unit = 2.0 ** (max(math.frexp(value)[1] - 1, lowest) - mantissa)
        threshold = abs(value) / unit % 1 + random_word(-5, 2, row * exact.shape[1] + column) / 2**32
        if abs(threshold - 1) < 2.0**-12:  # float32 leaves 13 bits and more of the part that is cut off
            borderline += 1
            continue
        expected = math.copysign((math.floor(abs(value) / unit) + (threshold > 1)) * unit, value)
        assert actual[row, column].item() == expected
    assert borderline < 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_right_on_average(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """100 steps of a hundredth of a unit: to nearest, none of them would move anything."""
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    lr = unit / 100
    one = Layer(torch.full((64, 500), 1.5).to(dtype), torch.arange(0, 64, 2), 0, lr=lr, weight_decay=0.0)
    to([one], device)
    for _ in range(100):
        stochastic_step([one], backend, [-torch.ones_like(one.value)])
    moved = (one.selected().double() - 1.5) / unit
    # The number of units moved is binomial: mean 1, variance 0.99.
    count = moved.numel()
    assert abs(moved.mean().item() - 1) < 5 * math.sqrt(0.99 / count)
    assert abs(moved.var().item() - 0.99) < 5 * math.sqrt((2 * 0.99**2 + 1) / count)
    # Neither rows nor columns move together.
    centered = moved - moved.mean()
    for shifted in (centered.roll(1, 0), centered.roll(1, 1), centered.roll(8, 1), centered.roll((1, 1), (0, 1))):
        assert abs((centered * shifted).mean().item()) < 5 / math.sqrt(count)


def test_stochastic_bfloat16_follows_float32(backend: str, device: torch.device) -> None:
    """200 steps at a rate at which bfloat16 alone would lose nearly all: as far as in float32, within 2 %."""
    weight = torch.randn(300, 200) * 0.02
    rounded = Layer(weight.bfloat16(), torch.arange(300), 0, lr=1e-6, weight_decay=0.1)
    exact = Layer(weight.bfloat16().float(), torch.arange(300), 0, lr=1e-6, weight_decay=0.1)
    to([rounded, exact], device)
    direction = torch.randn(300, 200).to(device)
    for t in range(200):
        grad = direction + 0.1 * gradients([exact], t)[0]
        stochastic_step([rounded], backend, [grad.clone()])
        exact.step += 1
        sparse_adamw_(*arguments([exact], [grad]), BETAS, EPS, backend=backend)
    path, truth = (one.selected().double() - weight.bfloat16().to(device).double() for one in (rounded, exact))
    along = (path * truth).sum() / truth.square().sum()
    assert abs(along.item() - 1) < 0.02


def test_stochastic_rounding_is_the_same_for_every_number_of_threads(
    backend: str, device: torch.device, two_threads: None
) -> None:
    first = to(layers(torch.bfloat16), device)
    second, other_seed = copy.deepcopy(first), copy.deepcopy(first)
    for threads, mine, seed in ((2, first, 0), (1, second, 0), (1, other_seed, 1000)):
        torch.set_num_threads(threads)
        for t in range(3):
            stochastic_step(mine, backend, gradients(mine, t), seed)
    assert all(torch.equal(bits(a.weight), bits(b.weight)) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(bits(a.weight), bits(b.weight)) for a, b in zip(first, other_seed, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_nan_and_infinity(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.tensor([[math.inf, -math.inf, math.nan, 1.0, -0.0]]).repeat(4, 1).to(dtype)
    one = to([Layer(weight, torch.arange(4), 0, lr=0.0)], device)[0]
    stochastic_step([one], backend, gradients([one], 0))
    assert torch.equal(one.selected().cpu().isnan(), weight.isnan())
    assert torch.equal(one.selected().cpu()[:, [0, 1, 3, 4]], weight[:, [0, 1, 3, 4]])


@MOMENTUM
def test_sgd_stochastic_rounding(backend: str, device: torch.device, momentum: float) -> None:
    """Without masters: between the neighbors of the float32 values, on their mean, and the same for one seed."""
    exact = SgdLayers.make(torch.float32, device)
    exact.weights = [weight.bfloat16().float() for weight in exact.weights]
    exact.values = exact.selected()
    rounded = copy.deepcopy(exact)
    rounded.weights = [weight.bfloat16() for weight in rounded.weights]
    again, before = copy.deepcopy(rounded), rounded.outside()
    seed = torch.arange(len(rounded.weights))
    exact.step(momentum, backend)
    rounded.step(momentum, backend, masters=False, seed=seed)
    again.step(momentum, backend, masters=False, seed=seed)
    assert same(rounded.weights, again.weights)
    assert same(rounded.outside(), before)
    ulps = []
    for actual, value in zip(rounded.selected(), exact.selected(), strict=True):
        unit = 2.0 ** (value.abs().log2().floor() - 7)
        ulps.append(((actual.double() - value.double()) / unit).flatten())
    errors = torch.cat(ulps)
    assert errors.abs().max() < 1 + 1e-3
    assert (errors != 0).double().mean() > 0.9
    assert abs(errors.mean().item()) < 5 * math.sqrt(1 / 4 / errors.numel())
