"""What only the Triton kernel of the optimizers has: numbers on the device, parts too large for a launch, launches."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from clue_fast.kernels import sparse_optimizer as kernels
from clue_fast.ops import backend as backends
from clue_fast.ops import sparse_adamw_, sparse_sgd_
from tests.ops.slices import (
    BETAS,
    EPS,
    Layer,
    SgdLayers,
    arguments,
    bits,
    gradients,
    in_float64,
    layer,
    same,
    step,
    stochastic_step,
)

if backends.available()["triton"] is not None or torch.cuda.is_available():
    pytest.skip("these tests hold the kernel to numbers on the CPU in Triton's interpreter", allow_module_level=True)

STATE = ("weight", "value", "exp_avg", "exp_avg_sq")
MASTERS = pytest.mark.parametrize("masters", [True, False])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grid of every launch: programs of a part, and parts where it takes several."""
    seen: list[tuple[int, ...]] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.kernel = getattr(kernels, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            seen.append(grid)
            return self.kernel[grid]

    for name in ("sparse_optimizer_kernel", "sparse_optimizer_captured_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name))
    return seen


def update(mine: list[Layer], masters: bool, t: int) -> None:
    if masters:
        step(mine, "triton", seed=t)
    else:
        stochastic_step(mine, "triton", gradients(mine, t), seed=2**40 * t - 7)


def made() -> list[Layer]:
    shapes = [(9, 64), (31, 7)]
    return [layer(shape, dim, 3, torch.bfloat16, lr=3e-3, weight_decay=0.1) for shape in shapes for dim in (0, 1)]


def assert_same(one: list[Layer], other: list[Layer]) -> None:
    for a, b in zip(one, other, strict=True):
        for name in STATE:
            assert torch.equal(bits(getattr(a, name)), bits(getattr(b, name))), name


@MASTERS
def test_numbers_read_on_the_device(monkeypatch: pytest.MonkeyPatch, masters: bool) -> None:
    """Factors and keys worked out in the kernel are those of the host, in early steps and in late ones."""
    on_host = made()
    on_device = copy.deepcopy(on_host)
    for t in (0, 1, 1000):
        for one in (*on_host, *on_device):
            one.step = t
        update(on_host, masters, t)
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "on_host", lambda numbers: False)
            update(on_device, masters, t)
    assert_same(on_host, on_device)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_with_numbers_read_on_the_device(monkeypatch: pytest.MonkeyPatch, momentum: float) -> None:
    on_host = SgdLayers.make(torch.float16, torch.device("cpu"))
    on_device = copy.deepcopy(on_host)
    for t in range(2):
        on_host.step(momentum, "triton")
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "on_host", lambda numbers: False)
            on_device.step(momentum, "triton")
        assert same(on_host.weights, on_device.weights) and same(on_host.momenta, on_device.momenta), t


def test_numbers_in_two_places_are_refused() -> None:
    mine = made()
    *others, lr, decay, t = arguments(mine, gradients(mine, 0))
    with pytest.raises(ValueError, match=r"lr, weight_decay, step and seed must be in one place.*not on cpu and meta"):
        backends.launch("sparse_optimizer", "sparse_adamw", lr.device, "triton")(
            *others, lr, decay.to("meta"), t, None, None, None, *BETAS, EPS
        )


@MASTERS
def test_one_launch_for_all_weights_of_a_kind(launches: list[tuple[int, ...]], masters: bool) -> None:
    """Layers of a model: all rows in one, all columns in another, and none for a part that is empty."""
    rows = [layer((9, 64), 0, 3, torch.bfloat16) for _ in range(7)]
    columns = [layer((32, 9), 1, 5, torch.bfloat16) for _ in range(3)]
    mine = [*rows[:4], *columns, layer((5, 7), 1, 0, torch.bfloat16), *rows[4:]]
    apart = copy.deepcopy(mine)
    update(mine, masters, 0)
    assert launches == [(1, 7), (1, 3)]
    grads = gradients(apart, 0)
    for i, (one, grad) in enumerate(zip(apart, grads, strict=True)):
        if masters:
            step([one], "triton", grads=[grad])
        else:
            stochastic_step([one], "triton", [grad], seed=i - 7)
    assert_same(mine, apart)


@MASTERS
def test_parts_of_very_different_sizes_do_not_wait_in_one_launch(
    monkeypatch: pytest.MonkeyPatch, launches: list[tuple[int, ...]], masters: bool
) -> None:
    """Programs are as many as the largest part of a launch takes, at most twice those of the smallest."""
    monkeypatch.setattr(kernels, "BLOCK", 64)
    mine = [layer((3 * rows, 64), 0, rows, torch.bfloat16) for rows in (1, 2, 3, 4, 9, 16)]
    whole = copy.deepcopy(mine)
    update(mine, masters, 0)
    assert launches == [(1, 1), (2, 1), (4, 2), (16, 2)]
    monkeypatch.setattr(kernels, "BLOCK", 2048)
    update(whole, masters, 0)
    assert_same(mine, whole)


@MASTERS
def test_one_launch_a_weight_with_numbers_on_the_device(
    monkeypatch: pytest.MonkeyPatch, launches: list[tuple[int, ...]], masters: bool
) -> None:
    monkeypatch.setattr(kernels, "on_host", lambda numbers: False)
    mine = [*made(), layer((5, 7), 1, 0, torch.bfloat16)]
    update(mine, masters, 0)
    assert launches == [(1,)] * (len(mine) - 1)


@MASTERS
@pytest.mark.parametrize("on_host", [True, False])
def test_parts_that_are_larger_than_a_launch(
    monkeypatch: pytest.MonkeyPatch, launches: list[tuple[int, ...]], masters: bool, on_host: bool
) -> None:
    """In pieces of rows, with the same bits: random numbers are counted from the first value of the whole part."""
    monkeypatch.setattr(kernels, "on_host", lambda numbers: on_host)
    whole = made()
    pieces = copy.deepcopy(whole)
    update(whole, masters, 0)
    del launches[:]
    monkeypatch.setattr(kernels, "LARGEST", 10)
    update(pieces, masters, 0)
    assert sum(grid[1] if on_host else 1 for grid in launches) > 2 * len(pieces)
    assert_same(whole, pieces)


@pytest.mark.parametrize("position", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5])
def test_positions_beyond_32_bits_go_on_from_zero(position: int) -> None:
    """As csrc/cuda counts them. The first position of a piece is handed over in signed numbers of 32 bits."""
    grad = torch.empty(1, 1).expand(position // 2**20 + 2, 2**20)
    pieces = list(kernels.parts_of([None, grad, None, None], grad, torch.empty(0), True))
    rows = 0
    for piece in pieces:
        assert piece.first_position % 2**32 == rows * 2**20 % 2**32 and -(2**31) <= piece.first_position < 2**31
        rows += piece.selected[1].shape[0]
    assert rows == len(grad)


@pytest.mark.parametrize("seed", [0, -5, 2**63 - 1, -(2**63), 1234567])
def test_keys_of_the_host_are_splitmix64(seed: int) -> None:
    """As Steele, Lea & Flood 2014 have it, in Python's integers."""
    for t in (1, 2, 10**6):
        z = (seed + t * 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z ^= z >> 31
        key = kernels.host_key(seed, t)
        assert key % 2**64 == z and -(2**63) <= key < 2**63


def test_an_address_with_the_highest_bit_fits_the_table() -> None:
    """As those of Intel's GPUs have it."""
    row = [kernels.signed(address) for address in (0, 2**63 - 1, 2**63, 0xFF00_0000_1234_5670)]
    table = torch.tensor(row)
    assert [number % 2**64 for number in table.tolist()] == [0, 2**63 - 1, 2**63, 0xFF00_0000_1234_5670]


@pytest.mark.parametrize("on_host", [True, False])
def test_betas_of_zero(monkeypatch: pytest.MonkeyPatch, on_host: bool) -> None:
    """No moment is kept: each step moves by the sign of the gradient, as RPROP does (eps is small here)."""
    monkeypatch.setattr(kernels, "on_host", lambda numbers: on_host)
    one = layer((6, 8), 0, 2, torch.float32, lr=0.25, weight_decay=0.0)
    before = one.value.clone()
    one.step = 1
    grads = gradients([one], 0)
    sparse_adamw_(*arguments([one], grads), (0.0, 0.0), 1e-12, backend="triton")
    assert torch.allclose(one.value, before - 0.25 * grads[0].sign(), atol=1e-6)


def test_what_16_bits_hold_stays_whatever_the_random_bits_are() -> None:
    """Rounding alone, with a rate of zero: normal and subnormal numbers, zeros, infinities and NaN."""
    generator = random.Random(0)
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.tensor([generator.getrandbits(16) - 2**15 for _ in range(4096)], dtype=torch.int16)
        weight = patterns.view(dtype).view(64, 64).clone()
        one = Layer(weight.clone(), torch.arange(64), 0, lr=0.0)
        stochastic_step([one], "triton", gradients([one], 0))
        number = ~weight.isnan()
        assert torch.equal(one.weight.isnan(), weight.isnan())
        assert torch.equal(one.weight[number], weight[number])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_with_the_same_random_bits_as_the_others(backend: str, dtype: torch.dtype) -> None:
    """SGD with gradients that are sums of powers of two: values are exact, so every bit must be the same.

    From numbers that are subnormal in float16 to large ones, and beyond its range.
    """
    if backends.available()[backend] is not None:
        pytest.skip(backends.available()[backend])

    def stepped(name: str) -> Tensor:
        exponents = torch.arange(-26, 18, dtype=torch.float32).repeat(6)
        signs = torch.tensor([1.0, -1.0]).repeat(132)
        weight = (signs * torch.exp2(exponents)).view(6, 44).to(dtype)
        grad = torch.randint(1, 2**9, (6, 44), generator=torch.Generator().manual_seed(0)) * weight.float() * 2.0**-18
        rates = [torch.tensor([rate], dtype=torch.float64) for rate in (1.0, 0.0)]
        t, seed = torch.tensor([3]), torch.tensor([11])
        sparse_sgd_(None, [grad], None, [weight], [torch.arange(6)], [0], *rates, t, seed=seed, backend=name)
        return weight

    found, expected = stepped("triton"), stepped(backend)
    assert torch.equal(bits(found), bits(expected))


def test_follows_the_paper_for_many_steps_with_numbers_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_host", lambda numbers: False)
    mine = made()
    expected = in_float64(mine, 20)
    for t in range(1, 21):
        step(mine, "triton", seed=t)
    for one, exact in zip(mine, expected, strict=True):
        for name, truth in exact.items():
            assert (getattr(one, name).double() - truth).norm() <= 2e-6 * truth.norm(), name
