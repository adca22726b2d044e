from __future__ import annotations

import copy
import math
import random
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue_fast.errors import BackendError, UnknownNameError
from clue_fast.ops import backend as backends
from clue_fast.ops import sparse_adamw_

OPERATOR = "sparse_adamw"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS, EPS = (0.8, 0.95), 1e-6
# A vector's worth and less, more than one block of 16384 values, and sizes that end inside a vector.
SHAPES = [(1, 1), (5, 37), (431, 71), (64, 1030)]


@dataclass
class Layer:
    """A weight with a selected part, as the optimizer sees it."""

    weight: Tensor
    index: Tensor
    dim: int
    lr: float = 1e-3
    weight_decay: float = 0.1
    step: int = 0
    value: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.value = self.weight.index_select(self.dim, self.index).float()
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.value), torch.zeros_like(self.value)

    def selected(self) -> Tensor:
        return self.weight.index_select(self.dim, self.index)


def layer(shape: tuple[int, int], dim: int, count: int, dtype: torch.dtype, **kwargs: float) -> Layer:
    weight = torch.randn(shape).to(dtype)
    return Layer(weight, torch.randperm(shape[dim])[:count].sort().values, dim, **kwargs)


def layers(dtype: torch.dtype) -> list[Layer]:
    """Of every shape, by rows and by columns: one, some and all; each with its own rate and decay."""
    made = []
    for shape in SHAPES:
        for dim in (0, 1):
            for count in sorted({1, (shape[dim] + 2) // 3, shape[dim]}):
                number = len(made)
                made.append(layer(shape, dim, count, dtype, lr=1e-3 * (1 + number), weight_decay=0.02 * number))
    return made


def to(layers: list[Layer], device: torch.device | str) -> list[Layer]:
    for one in layers:
        for name in ("weight", "index", "value", "exp_avg", "exp_avg_sq"):
            setattr(one, name, getattr(one, name).to(device))
    return layers


def gradients(layers: list[Layer], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(one.value.shape, generator=generator).to(one.value.device) for one in layers]


def arguments(layers: list[Layer], grads: list[Tensor]) -> tuple[list, ...]:
    return (
        [one.value for one in layers],
        grads,
        [one.exp_avg for one in layers],
        [one.exp_avg_sq for one in layers],
        [one.weight for one in layers],
        [one.index for one in layers],
        [one.dim for one in layers],
        torch.tensor([one.lr for one in layers], dtype=torch.float64),
        torch.tensor([one.weight_decay for one in layers], dtype=torch.float64),
        torch.tensor([one.step for one in layers], dtype=torch.int64),
    )


def step(layers: list[Layer], backend: str | None, seed: int = 0, **kwargs: Tensor) -> None:
    for one in layers:
        one.step += 1
    sparse_adamw_(*arguments(layers, gradients(layers, seed)), BETAS, EPS, **kwargs, backend=backend)


def bits(x: Tensor) -> Tensor:
    return x.cpu().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def outside(one: Layer) -> Tensor:
    """Bits of what is not selected."""
    rest = torch.ones(one.weight.shape[one.dim], dtype=torch.bool)
    rest[one.index.cpu()] = False
    return bits(one.weight).index_select(one.dim, rest.nonzero().flatten())


def in_float64(layers: list[Layer], steps: int) -> list[dict[str, Tensor]]:
    """The same steps, from the paper (Loshchilov & Hutter 2019, algorithm 2), in float64."""
    values = [one.value.double().cpu() for one in layers]
    first, second = ([torch.zeros_like(x) for x in values] for _ in range(2))
    for t in range(1, steps + 1):
        for i, (one, grad) in enumerate(zip(layers, gradients(layers, t), strict=True)):
            g = grad.double().cpu()
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g**2
            m_hat, v_hat = first[i] / (1 - BETAS[0] ** t), second[i] / (1 - BETAS[1] ** t)
            values[i] = values[i] * (1 - one.lr * one.weight_decay) - one.lr * m_hat / (v_hat.sqrt() + EPS)
    names = ("value", "exp_avg", "exp_avg_sq")
    return [dict(zip(names, state, strict=True)) for state in zip(values, first, second, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_the_definition(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """To 1e-6, and what is not selected keeps its bits."""
    mine = to(layers(dtype), device)
    expected, before = in_float64(mine, 5), [outside(one) for one in mine]
    for t in range(1, 6):
        step(mine, backend, seed=t)
    for one, exact, rest in zip(mine, expected, before, strict=True):
        for name, truth in exact.items():
            error = getattr(one, name).cpu().double() - truth
            assert error.norm() <= 1e-6 * truth.norm(), name
        assert torch.equal(outside(one), rest)
        assert torch.equal(bits(one.selected()), bits(one.value.to(dtype)))


def test_as_exact_as_torch_adamw(backend: str, device: torch.device) -> None:
    """200 steps at a small rate, where a rounding that is done otherwise would add up.

    From PyTorch's own in float64 at most twice as far as PyTorch's own in float32.
    """
    mine = to([layer((40, 37), dim, 9, torch.float32, lr=1e-6, weight_decay=0.1) for dim in (0, 1)], device)
    copies = {
        dtype: [torch.nn.Parameter(one.value.to(dtype)) for one in mine] for dtype in (torch.float32, torch.float64)
    }
    optimizers = {
        dtype: torch.optim.AdamW(own, lr=1e-6, weight_decay=0.1, betas=BETAS, eps=EPS, foreach=False)
        for dtype, own in copies.items()
    }
    for t in range(200):
        for dtype, own in copies.items():
            for copied, grad in zip(own, gradients(mine, t), strict=True):
                copied.grad = grad.to(dtype)
            optimizers[dtype].step()
        step(mine, backend, seed=t)
    for one, theirs, exact in zip(mine, *copies.values(), strict=True):
        state, truth = (optimizers[copied.dtype].state[copied] for copied in (theirs, exact))
        for found, other, wanted in (
            (one.value, theirs, exact),
            (one.exp_avg, state["exp_avg"], truth["exp_avg"]),
            (one.exp_avg_sq, state["exp_avg_sq"], truth["exp_avg_sq"]),
        ):
            assert (found - wanted).norm() <= 2 * (other - wanted).norm() + 2.0**-24 * wanted.norm()


@pytest.mark.parametrize("wrong", ["nothing moves", "sign", "rate", "decay", "step"])
def test_a_wrong_update_is_seen(backend: str, device: torch.device, wrong: str) -> None:
    """The bound of 1e-6 tells a step apart from one with a mistake in it."""
    mine = to([layer((20, 37), 0, 9, torch.float32, lr=1e-3, weight_decay=0.1)], device)
    broken, start = copy.deepcopy(mine), mine[0].value.clone()
    step(mine, backend)
    if wrong == "nothing moves":
        broken[0].value = start
    elif wrong == "sign":
        broken[0].value = 2 * start - mine[0].value
    else:
        broken[0].step = 3 if wrong == "step" else 0
        broken[0].lr *= 1.01 if wrong == "rate" else 1
        broken[0].weight_decay *= 0.0 if wrong == "decay" else 1
        step(broken, backend)
    assert (broken[0].value - mine[0].value).norm() > 1e-6 * mine[0].value.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_outside_stays(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Negative zeros, infinities and every kind of NaN, next to and around what is selected."""
    width = torch.int32 if dtype == torch.float32 else torch.int16
    size = 63
    generator = random.Random(0)
    patterns = [generator.getrandbits(8 * width.itemsize - 1) for _ in range(size * size)]
    specials = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan], dtype=dtype).view(width).tolist()
    patterns[: 5 * 200] = specials * 200
    generator.shuffle(patterns)
    for dim in (0, 1):
        weight = torch.tensor(patterns, dtype=width).view(size, size).view(dtype)
        index = torch.randperm(size)[:9].sort().values
        weight.index_fill_(dim, index, 0.5)
        mine = to([Layer(weight, index, dim)], device)
        before = outside(mine[0])
        assert before.unique().numel() > 1000
        for seed in range(3):
            step(mine, backend, seed)
        assert torch.equal(outside(mine[0]), before)
        assert not torch.equal(mine[0].selected().cpu(), torch.full_like(mine[0].selected().cpu(), 0.5))


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


def test_gradient_scale(backend: str, device: torch.device) -> None:
    plain = to(layers(torch.bfloat16), device)
    scaled = copy.deepcopy(plain)
    for t in range(3):
        step(plain, backend, seed=t)
        grads = [1024 * grad for grad in gradients(scaled, t)]
        for one in scaled:
            one.step += 1
        scale = torch.tensor([1024.0], device=device)
        sparse_adamw_(*arguments(scaled, grads), BETAS, EPS, grad_scale=scale, backend=backend)
    for a, b in zip(plain, scaled, strict=True):
        assert torch.equal(bits(a.weight), bits(b.weight)) and torch.equal(bits(a.value), bits(b.value))


@pytest.mark.parametrize("master", ["fp32", "stochastic"])
def test_found_inf_changes_nothing(backend: str, device: torch.device, master: str) -> None:
    mine = to(layers(torch.bfloat16), device)
    before = copy.deepcopy(mine)
    for one in mine:
        one.step += 1
    given = list(arguments(mine, [grad.fill_(math.nan) for grad in gradients(mine, 0)]))
    seed = None
    if master == "stochastic":
        given[0], seed = None, torch.arange(len(mine))
    for found in (1.0, 0.0):
        found_inf = torch.tensor(found, device=device)
        sparse_adamw_(*given, BETAS, EPS, seed=seed, found_inf=found_inf, backend=backend)
        for a, b in zip(before, mine, strict=True):
            unchanged = [torch.equal(bits(getattr(a, name)), bits(getattr(b, name))) for name in ("weight", "exp_avg")]
            assert unchanged == [found == 1.0] * 2


def stochastic_step(layers: list[Layer], backend: str | None, grads: list[Tensor], seed: int = 0) -> None:
    """One step without master values; weight i has seed + i."""
    for one in layers:
        one.step += 1
    seeds = torch.arange(seed, seed + len(layers))
    _, *others = arguments(layers, grads)
    sparse_adamw_(None, *others, BETAS, EPS, seed=seeds, backend=backend)


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


def test_float32_weights_are_their_own_masters(backend: str, device: torch.device) -> None:
    with_masters = to(layers(torch.float32), device)
    without = copy.deepcopy(with_masters)
    for t in range(3):
        step(with_masters, backend, seed=t)
        for one in without:
            one.step += 1
        _, *others = arguments(without, gradients(without, t))
        sparse_adamw_(None, *others, BETAS, EPS, backend=backend)
    for a, b in zip(with_masters, without, strict=True):
        assert torch.equal(bits(a.weight), bits(b.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_nan_and_infinity(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.tensor([[math.inf, -math.inf, math.nan, 1.0, -0.0]]).repeat(4, 1).to(dtype)
    one = to([Layer(weight, torch.arange(4), 0, lr=0.0)], device)[0]
    stochastic_step([one], backend, gradients([one], 0))
    assert torch.equal(one.selected().cpu().isnan(), weight.isnan())
    assert torch.equal(one.selected().cpu()[:, [0, 1, 3, 4]], weight[:, [0, 1, 3, 4]])


def test_selected_parts_that_are_empty(backend: str, device: torch.device) -> None:
    empty = [layer((5, 7), dim, 0, torch.float32) for dim in (0, 1)]
    mine = to([*empty, layer((5, 7), 0, 2, torch.float32)], device)
    before = [one.weight.clone() for one in mine]
    step(mine, backend)
    for one, weight in zip(mine[:2], before[:2], strict=True):
        assert torch.equal(one.weight, weight)
    assert not torch.equal(mine[2].weight, before[2])
    sparse_adamw_(*arguments([], []), BETAS, EPS, backend=backend)


def test_dtypes_and_dims_in_one_call(backend: str, device: torch.device) -> None:
    together = to([layer((30, 41), dim, 7, dtype) for dtype in DTYPES for dim in (0, 1)], device)
    apart = copy.deepcopy(together)
    grads = gradients(together, 0)
    for one in (*together, *apart):
        one.step = 1
    sparse_adamw_(*arguments(together, grads), BETAS, EPS, backend=backend)
    for one, grad in zip(apart, grads, strict=True):
        sparse_adamw_(*arguments([one], [grad]), BETAS, EPS, backend=backend)
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(bits(a.weight), bits(b.weight)) and torch.equal(a.value, b.value)


def test_a_bias_is_a_weight_of_one_column(backend: str, device: torch.device) -> None:
    bias = torch.randn(50, dtype=torch.float32).to(device)
    before = bias.clone()
    one = Layer(bias.unsqueeze(1), torch.tensor([3, 30], device=device), 0)
    step([one], backend)
    assert set((bias != before).nonzero().flatten().tolist()) == {3, 30}


def test_same_bits_for_every_number_of_threads(backend: str, device: torch.device, two_threads: None) -> None:
    first = to(layers(torch.bfloat16), device)
    second = copy.deepcopy(first)
    for threads, mine in ((2, first), (1, second)):
        torch.set_num_threads(threads)
        for t in range(3):
            step(mine, backend, seed=t)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(bits(a.weight), bits(b.weight)) and torch.equal(bits(a.value), bits(b.value))
        assert torch.equal(bits(a.exp_avg), bits(b.exp_avg)) and torch.equal(bits(a.exp_avg_sq), bits(b.exp_avg_sq))


PROPERTY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dim=st.integers(0, 1),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape_and_selection(
    backend: str, device: torch.device, shape: tuple[int, int], dim: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    chosen = sorted(data.draw(st.sets(st.integers(0, shape[dim] - 1))))
    one = Layer(torch.randn(shape).to(dtype), torch.tensor(chosen, dtype=torch.int64), dim)
    mine = to([one], device)
    before = outside(one)
    (expected,) = in_float64([copy.deepcopy(one)], 1)
    step(mine, backend, seed=1)
    assert torch.allclose(one.value.cpu().double(), expected["value"], rtol=1e-6, atol=1e-7)
    assert torch.equal(outside(one), before)
    assert torch.equal(bits(one.selected()), bits(one.value.to(dtype)))


def test_a_backward_that_needs_the_old_weight_notices(backend: str, device: torch.device) -> None:
    one = to([layer((5, 7), 0, 2, torch.float32)], device)[0]
    x = torch.randn(3, 7, device=device, requires_grad=True)
    y = x @ one.weight.t()
    step([one], backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_opcheck(backend: str, device: torch.device) -> None:
    mine = to([layer((8, 9), dim, 3, torch.bfloat16, step=1) for dim in (0, 1)], device)
    given = arguments(mine, gradients(mine, 0))
    one, operator = torch.ones(1, device=device), torch.ops.clue_fast.sparse_adamw_.default
    torch.library.opcheck(operator, (*given, None, one, 0 * one, *BETAS, EPS, backend))
    torch.library.opcheck(operator, ([], *given[1:], torch.tensor([3, 4]), None, None, *BETAS, EPS, backend))


@pytest.mark.slow
def test_compile(backend: str, device: torch.device) -> None:
    eager = to([layer((8, 9), dim, 3, torch.bfloat16, step=1) for dim in (0, 1)], device)
    compiled, grads = copy.deepcopy(eager), gradients(eager, 0)

    def update(mine: tuple[list, ...]) -> None:
        sparse_adamw_(*mine, BETAS, EPS, backend=backend)

    update(arguments(eager, grads))
    torch.compile(update, fullgraph=True)(arguments(compiled, grads))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(bits(a.weight), bits(b.weight)) and torch.equal(a.value, b.value)


def test_bad_input() -> None:
    one = layer((6, 5), 0, 2, torch.float32, step=1)
    good = list(arguments([one], gradients([one], 0)))
    names = ["values", "grads", "exp_avgs", "exp_avg_sqs", "weights", "indices", "dims", "lr", "weight_decay", "step"]

    def refused(error: type[Exception], message: str, **wrong: object) -> None:
        changed = [wrong.pop(name, argument) for name, argument in zip(names, good, strict=True)]
        with pytest.raises(error, match=message):
            sparse_adamw_(*changed, BETAS, EPS, **wrong)

    refused(ValueError, "1 weights, but 0 grads", grads=[])
    refused(ValueError, r"must be contiguous \[2, 5\] float32", grads=[good[1][0].bfloat16()])
    refused(ValueError, r"must be contiguous \[2, 5\] float32", values=[torch.zeros(5, 2).t()])
    refused(ValueError, "weight 0 must be contiguous", weights=[torch.zeros(5, 6).t()])
    refused(ValueError, r"dims\[0\] must be 0 for rows or 1 for columns, not 2", dims=[2])
    refused(ValueError, "int64", indices=[good[5][0].int()])
    refused(ValueError, "lr must be torch.float64", lr=good[7].float())
    refused(ValueError, "weight_decay must be torch.float64", weight_decay=good[8][:0])
    refused(ValueError, "step must be torch.int64", step=good[9].double())
    refused(ValueError, "seed must be torch.int64", values=None, seed=torch.tensor([1.0]))
    refused(ValueError, "either values, the float32 masters, or a seed", seed=torch.tensor([1]))
    refused(ValueError, "16-bit weights need", values=None, weights=[good[4][0].bfloat16()])
    refused(ValueError, "grad_scale must be one float32", grad_scale=torch.ones(1, dtype=torch.float64))
    refused(ValueError, "found_inf must be one float32", found_inf=torch.zeros(2))
    refused(UnknownNameError, "unknown backend 'fast'", backend="fast")
    refused(BackendError, "has no triton backend", backend="triton")


def test_cpp_refuses_an_index_outside_the_weight() -> None:
    if backends.available()["cpp"] is not None:
        pytest.skip(backends.available()["cpp"])
    one = layer((6, 5), 0, 2, torch.float32)
    one.index = torch.tensor([1, 6])
    before = one.weight.clone()
    with pytest.raises(ValueError, match="an index is 6, outside"):
        step([one], "cpp")
    assert torch.equal(one.weight, before)


@pytest.mark.gpu
@pytest.mark.parametrize("master", ["fp32", "stochastic"])
def test_a_cuda_graph_follows_its_numbers(master: str) -> None:
    """Rates, decays, steps, scale and found_inf that change between replays, against launches with numbers on CPU."""
    eager = to(layers(torch.bfloat16), "cuda")
    graphed = copy.deepcopy(eager)
    seed = None if master == "fp32" else torch.arange(len(eager))

    def given(mine: list[Layer], grads: list[Tensor]) -> list:
        values, *others = arguments(mine, grads)
        return [values if seed is None else None, *others]

    static = gradients(graphed, 0)
    captured = given(graphed, static)
    numbers = [number.cuda() for number in captured[-3:]]
    scale, found_inf = torch.ones(1, device="cuda"), torch.ones(1, device="cuda")
    options = {"grad_scale": scale, "found_inf": found_inf, "backend": "cuda"}
    options["seed"] = None if seed is None else seed.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_adamw_(*captured[:-3], *numbers, BETAS, EPS, **options)
    for t in range(4):
        for one in eager:
            one.step, one.lr = one.step + (t != 2), one.lr * 0.5
        numbers[0].mul_(0.5)
        numbers[2].add_(t != 2)
        scale.fill_(2.0**t)
        found_inf.fill_(float(t == 2))
        for kept, grad in zip(static, gradients(graphed, t), strict=True):
            kept.copy_(grad * 2.0**t)
        graph.replay()
        if t != 2:
            sparse_adamw_(*given(eager, gradients(eager, t)), BETAS, EPS, seed=seed, backend="cuda")
    for a, b in zip(eager, graphed, strict=True):
        for name in ("weight", "value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
