"""Both rules on selected rows and columns: the definition, the arguments, the bits that stay."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.ops import backend as backends
from clue_fast.ops import sparse_adamw_, sparse_sgd_
from tests.ops.slices import (
    BETAS,
    DTYPES,
    EPS,
    Layer,
    SgdLayers,
    arguments,
    bits,
    gradients,
    in_float64,
    layer,
    layers,
    outside,
    same,
    step,
    to,
)

OPERATOR = "sparse_optimizer"
MOMENTUM = pytest.mark.parametrize("momentum", [0.0, 0.9])


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
@pytest.mark.parametrize("launched_by", ["cuda", "triton"])
@pytest.mark.parametrize("master", ["fp32", "stochastic"])
def test_a_cuda_graph_follows_its_numbers(launched_by: str, master: str) -> None:
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
    options = {"grad_scale": scale, "found_inf": found_inf, "backend": launched_by}
    options["seed"] = None if seed is None else seed.cuda()
    sparse_adamw_(
        *captured[:-3], *numbers, BETAS, EPS, **options
    )  # compiles; found_inf keeps it from changing anything
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
            sparse_adamw_(*given(eager, gradients(eager, t)), BETAS, EPS, seed=seed, backend=launched_by)
    for a, b in zip(eager, graphed, strict=True):
        for name in ("weight", "value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


@MOMENTUM
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_sgd(backend: str, device: torch.device, dtype: torch.dtype, momentum: float) -> None:
    layers = SgdLayers.make(dtype, device)
    copies = [torch.nn.Parameter(value.clone()) for value in layers.values]
    groups = [
        {"params": [copied], "lr": lr, "weight_decay": decay}
        for copied, lr, decay in zip(copies, *(rate.tolist() for rate in layers.rates()), strict=True)
    ]
    theirs = torch.optim.SGD(groups, momentum=momentum, foreach=False)
    before = layers.outside()
    for t in range(1, 21):
        layers.step(momentum, backend)
        for copied, grad in zip(copies, layers.grads, strict=True):
            copied.grad = grad * t
        theirs.step()
    for value, copied in zip(layers.values, copies, strict=True):
        assert (value - copied).double().norm() <= 1e-6 * copied.double().norm()
    assert same(layers.outside(), before)
    assert same(layers.selected(), [value.to(dtype) for value in layers.values])


@MOMENTUM
def test_sgd_float32_weights_scale_and_found_inf(backend: str, device: torch.device, momentum: float) -> None:
    plain = SgdLayers.make(torch.float32, device)
    other = copy.deepcopy(plain)
    for t in range(3):
        plain.step(momentum, backend)
        other.grads = [8 * grad for grad in plain.grads]
        other.step(momentum, backend, masters=False, grad_scale=torch.full((1,), 8.0, device=device))
        if t == 0:
            before = copy.deepcopy(other)
            other.step(momentum, backend, masters=False, found_inf=torch.ones(1, device=device))
            assert same(other.weights, before.weights) and same(other.momenta, before.momenta)
            other.steps -= 1
    assert same(plain.weights, other.weights)


@MOMENTUM
def test_sgd_same_bits_for_every_number_of_threads(
    backend: str, device: torch.device, two_threads: None, momentum: float
) -> None:
    first = SgdLayers.make(torch.bfloat16, device)
    second = copy.deepcopy(first)
    for threads, mine in ((2, first), (1, second)):
        torch.set_num_threads(threads)
        for _ in range(3):
            mine.step(momentum, backend)
    assert same(first.weights, second.weights) and same(first.momenta, second.momenta)


def test_sgd_opcheck(backend: str, device: torch.device) -> None:
    layers = SgdLayers.make(torch.bfloat16, device)
    numbers = (*layers.rates(), torch.full((len(layers.weights),), 1))
    lists = (layers.values, layers.grads, layers.momenta, layers.weights, layers.indices, layers.dims)
    operator = torch.ops.clue_fast.sparse_sgd_.default
    torch.library.opcheck(operator, (*lists, *numbers, None, None, None, 0.9, backend))


def test_sgd_bad_input() -> None:
    layers = SgdLayers.make(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match="give both or neither"):
        numbers = (*layers.rates(), torch.full((len(layers.weights),), 1))
        sparse_sgd_(layers.values, layers.grads, None, layers.weights, layers.indices, layers.dims, *numbers, 0.9)
    with pytest.raises(ValueError, match="16-bit weights need"):
        layers.step(0.9, "reference", masters=False)
    layers.grads[2] = layers.grads[2].bfloat16()
    with pytest.raises(ValueError, match=r"grads\[2\] must be contiguous"):
        layers.step(0.9, "reference")
