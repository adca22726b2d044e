from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.ops import FIELDS, GRADIENT_FIELDS, channel_attribution, channel_statistics
from clue_fast.ops import backend as backends

OPERATOR = "channel_statistics"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# 0 and 1 token; 37 is odd; 300 is more than one run of 256. 1, 7 and 431 channels end inside a vector or tile.
SHAPES = [(0, 7), (1, 1), (1, 431), (37, 7), (37, 64), (300, 1), (300, 64), (300, 431)]
FEW_SHAPES = [(0, 7), (1, 1), (37, 71), (300, 3)]  # the interpreter takes milliseconds a tile
PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected_statistics(x: Tensor, group: Tensor, count: int) -> list[list[list[float]]]:
    """From the definition, exactly rounded sums in plain Python: [group][field][channel]."""
    tokens = x.double().tolist()
    result = []
    for g in range(1, count + 1):
        counted = [row for row, member in zip(tokens, group.tolist(), strict=True) if member == g]
        columns = [[row[c] for row in counted] for c in range(x.shape[1])]
        result.append(
            [
                [math.fsum(column) for column in columns],
                [math.fsum(a * a for a in column) for column in columns],
                [math.fsum(abs(a) for a in column) for column in columns],
                [max((abs(a) for a in column), default=0.0) for column in columns],
                [float(sum(a > 0 for a in column)) for column in columns],
            ]
        )
    return result


def assert_fits(actual: Tensor, expected: Tensor, magnitude: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Float32 sums over runs of at most 256 terms: a random walk of 16 roundings, of the sum of magnitudes.

    A term below float32's normal range may be lost. Float64 values are summed in float64, 300 of them.
    """
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-24
    excess = (actual.cpu() - expected).abs() - (16 * unit * magnitude + 300 * 2.0**-126)
    assert not (excess > 0).any(), f"{int((excess > 0).sum())} sums are off, the worst by {excess.max():.3g}"


def assert_statistics(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    actual = actual.cpu()
    assert_fits(actual[:, 0], expected[:, 0], expected[:, 2], dtype)
    assert_fits(actual[:, 1:3], expected[:, 1:3], expected[:, 1:3], dtype)
    assert torch.equal(actual[:, 3:], expected[:, 3:])


def data(tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(tokens, channels, dtype=torch.float64) * torch.rand(channels).mul(4).exp()
    x[torch.rand(tokens, channels) < 0.1] = 0.0  # zero is not active
    return x.to(dtype).to(device), torch.randint(0, 4, (tokens,), dtype=torch.int8).to(device)


def accumulators(channels: int, fields: tuple[str, ...], device: torch.device, groups: int = 3) -> Tensor:
    return torch.zeros(groups, len(fields), channels, dtype=torch.float64, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    for tokens, channels in FEW_SHAPES if backend == "triton" else SHAPES:
        x, group = data(tokens, channels, dtype, device)
        statistics = accumulators(channels, FIELDS, device)
        channel_statistics(x, group, statistics, backend=backend)
        expected = torch.tensor(expected_statistics(x, group, 3), dtype=torch.float64).view(3, 5, channels)
        assert_statistics(statistics, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attribution(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    for tokens, channels in FEW_SHAPES if backend == "triton" else SHAPES:
        (x, group), grad = data(tokens, channels, dtype, device), torch.randn(tokens, channels, dtype=torch.float64)
        grad = grad.to(dtype).to(device)
        attribution = accumulators(channels, GRADIENT_FIELDS, device)
        channel_attribution(x, grad, group, attribution, backend=backend)
        product = x.double().cpu() * grad.double().cpu()
        for g, actual in enumerate(attribution.cpu(), start=1):
            p = product[group.cpu() == g]
            magnitude, square = p.abs().sum(0), (p * p).sum(0)
            for row, expected, scale in zip(
                actual, (p.sum(0), magnitude, square), (magnitude, magnitude, square), strict=True
            ):
                assert_fits(row, expected, scale, dtype)


def test_group_sizes(backend: str, device: torch.device) -> None:
    """One group, many groups, all tokens in one, tokens of no group and of groups without a row."""
    x, _ = data(50, 9, torch.float32, device)
    for group in (
        torch.ones(50, dtype=torch.int8),
        torch.zeros(50, dtype=torch.int8),
        torch.full((50,), 127, dtype=torch.int8),
        torch.full((50,), -1, dtype=torch.int8),
        torch.arange(50, dtype=torch.int8) % 7,
    ):
        for count in (1, 2, 6):
            statistics = accumulators(9, FIELDS, device, count)
            channel_statistics(x, group.to(device), statistics, backend=backend)
            expected = torch.tensor(expected_statistics(x, group, count), dtype=torch.float64)
            assert_statistics(statistics, expected)


def test_writes_only_its_columns_and_adds_to_what_is_there(backend: str, device: torch.device) -> None:
    whole = torch.full((2, 5, 40), float("nan"), dtype=torch.float64, device=device)
    part = whole[:, :, 4:35]
    start = torch.rand(2, 5, 31, dtype=torch.float64) + 1
    part.copy_(start)
    wide, group = data(23, 35, torch.float32, device)
    x = wide[:, 2:33]  # rows further apart than their length
    channel_statistics(x, group, part, backend=backend)
    expected = torch.tensor(expected_statistics(x, group, 2), dtype=torch.float64)
    maximum = torch.maximum(start[:, 3], expected[:, 3])
    expected += start
    expected[:, 3] = maximum
    assert_statistics(part, expected)
    assert not torch.equal(part.cpu(), start), "nothing was added"
    assert whole[..., :4].isnan().all() and whole[..., 35:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_values_reach_the_sums(backend: str, device: torch.device, bad: float) -> None:
    x, group = data(300, 9, torch.bfloat16, device)
    grad = torch.ones_like(x)
    x[270, 4], group[270] = bad, 2
    statistics, attribution = accumulators(9, FIELDS, device), accumulators(9, GRADIENT_FIELDS, device)
    channel_statistics(x, group, statistics, backend=backend)
    channel_attribution(x, grad, group, attribution, backend=backend)
    for rows in (statistics[:, :3], attribution):
        finite = rows.isfinite().cpu()
        assert not finite[1, :, 4].any()
        finite[1, :, 4] = True
        assert finite.all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_active_and_largest_at_the_edges_of_a_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Zeros of both signs are not active, the least positive number is; magnitudes of both signs compare."""
    least, large = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, 2.0**15
    values = torch.tensor([0.0, -0.0, least, -least, 1.0, -1.0, large, -large], dtype=torch.float64)
    x = torch.stack([values.roll(shift) for shift in (0, 1, 3)]).to(dtype).to(device)
    assert (x > 0).any() and torch.equal(x[0].cpu().double(), values)
    for tokens in (1, 2, 3):
        group, statistics = torch.ones(tokens, dtype=torch.int8, device=device), accumulators(8, FIELDS, device, 1)
        channel_statistics(x[:tokens], group, statistics, backend=backend)
        expected = torch.tensor(expected_statistics(x[:tokens], group, 1), dtype=torch.float64)
        assert_statistics(statistics, expected)


def test_same_bits_on_every_run_and_number_of_threads(backend: str, device: torch.device, two_threads: None) -> None:
    x, group = data(*((300, 40) if backend == "triton" else (2100, 431)), torch.bfloat16, device)

    def run() -> tuple[Tensor, Tensor]:
        kept = accumulators(x.shape[1], FIELDS, device), accumulators(x.shape[1], GRADIENT_FIELDS, device)
        channel_statistics(x, group, kept[0], backend=backend)
        channel_attribution(x, x, group, kept[1], backend=backend)
        return kept

    first = run()
    runs = [run()]
    torch.set_num_threads(1)
    if backend == "cpp":  # PyTorch's own sums may split by thread
        runs.append(run())
    for other in runs:
        assert all(map(torch.equal, first, other))


@PROPERTY
@given(tokens=st.integers(0, 90), channels=st.integers(1, 40), seed=st.integers(0, 99), draw=st.data())
def test_sums_add_up_and_ignore_order(
    backend: str, device: torch.device, tokens: int, channels: int, seed: int, draw: st.DataObject
) -> None:
    if backend == "triton":
        tokens, channels = min(tokens, 20), min(channels, 20)
    torch.manual_seed(seed)
    x, group = data(tokens, channels, torch.float32, device)
    cut = draw.draw(st.integers(0, tokens))

    def run(*parts: Tensor) -> Tensor:
        statistics = accumulators(channels, FIELDS, device)
        for part in parts:
            channel_statistics(x[part], group[part], statistics, backend=backend)
        return statistics.cpu()

    everything = torch.arange(tokens, device=device)
    whole = run(everything)
    assert_statistics(run(everything[:cut], everything[cut:]), whole)
    assert_statistics(run(torch.randperm(tokens, device=device)), whole)


def test_leading_dimensions_and_strides(backend: str, device: torch.device) -> None:
    x, group = data(24, 30, torch.float32, device)
    flat, split, strided = (accumulators(15, FIELDS, device) for _ in range(3))
    channel_statistics(x[:, ::2].contiguous(), group, flat, backend=backend)
    channel_statistics(x[:, ::2].reshape(2, 3, 4, 15), group.view(2, 3, 4), split, backend=backend)
    channel_statistics(x[:, ::2], group, strided, backend=backend)
    assert flat.abs().sum() > 0
    assert torch.equal(flat, split) and torch.equal(flat, strided)


def test_takes_no_part_in_autograd(backend: str, device: torch.device) -> None:
    x, group = data(8, 5, torch.float32, device)
    x.requires_grad_()
    statistics, attribution = accumulators(5, FIELDS, device), accumulators(5, GRADIENT_FIELDS, device)
    channel_statistics(x, group, statistics, backend=backend)
    channel_attribution(x, x, group, attribution, backend=backend)
    assert not statistics.requires_grad and not attribution.requires_grad


def test_opcheck(backend: str, device: torch.device) -> None:
    x, group = data(12, 10, torch.float32, device)
    statistics, attribution = accumulators(10, FIELDS, device), accumulators(10, GRADIENT_FIELDS, device)
    torch.library.opcheck(torch.ops.clue_fast.channel_statistics.default, (x, group, statistics, backend))
    torch.library.opcheck(torch.ops.clue_fast.channel_attribution.default, (x, x + 1, group, attribution, backend))


@pytest.mark.slow
def test_compile(backend: str, device: torch.device) -> None:
    x, group = data(20, 12, torch.float32, device)

    def both(x: Tensor, statistics: Tensor, attribution: Tensor) -> Tensor:
        y = x + 1
        channel_statistics(y, group, statistics, backend=backend)
        channel_attribution(y, x, group, attribution, backend=backend)
        return y * 2

    results = []
    for function in (both, torch.compile(both, fullgraph=True)):
        kept = accumulators(12, FIELDS, device), accumulators(12, GRADIENT_FIELDS, device)
        results.append((function(x, *kept), *kept))
    assert all(map(torch.equal, *results))
    assert results[0][1].abs().sum() > 0


def test_bad_input() -> None:
    x, group = data(6, 4, torch.float32, torch.device("cpu"))
    statistics, attribution = accumulators(4, FIELDS, x.device), accumulators(4, GRADIENT_FIELDS, x.device)
    with pytest.raises(ValueError, match="group must be int8"):
        channel_statistics(x, group.int(), statistics)
    with pytest.raises(ValueError, match="group has 5 tokens"):
        channel_statistics(x, group[:5], statistics)
    with pytest.raises(ValueError, match=r"must be \[groups, 5, 4\]"):
        channel_statistics(x, group, attribution)
    with pytest.raises(ValueError, match="float64"):
        channel_statistics(x, group, statistics.float())
    with pytest.raises(ValueError, match="x and grad differ"):
        channel_attribution(x, x[:, :2], group, attribution)
    with pytest.raises(UnknownNameError, match="unknown backend 'fast'"):
        channel_statistics(x, group, statistics, backend="fast")


def test_launch_names() -> None:
    assert set(backends.IMPLEMENTATIONS[OPERATOR, "reference"].names) == {"channel_statistics", "channel_attribution"}
