"""What tests/ops cannot ask of the CUDA operators: replayed graphs, and that mistakes in the real kernels are found.

The operators' own tests run on the stand-in too, as the backend "cuda-on-host".
"""

from __future__ import annotations

import copy

import pytest
import torch

from clue_fast.ops import sparse_adamw_
from tests.cuda_on_host.library import library, operators
from tests.ops.slices import BETAS, EPS, Layer, arguments, bits, gradients, layer, layers, step, stochastic_step


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("masters", [True, False])
def test_a_replayed_graph_follows_its_numbers(masters: bool) -> None:
    """Rates, steps, scale and found_inf on the device change between replays; against launches with CPU numbers."""
    cuda = library(operators())
    eager = layers(torch.bfloat16)
    graphed = copy.deepcopy(eager)
    seed = None if masters else torch.arange(len(eager))

    def given(mine: list[Layer], grads: list[torch.Tensor]) -> list:
        values, *others = arguments(mine, grads)
        return [values if masters else None, *others]

    static = gradients(graphed, 0)
    captured = given(graphed, static)
    lr, _, count = captured[-3:]
    scale, found_inf = torch.ones(1), torch.ones(1)
    with cuda.as_backend("sparse_optimizer"):
        cuda.numbers_on_device = True
        with cuda.captured() as replay:
            sparse_adamw_(*captured, BETAS, EPS, seed=seed, grad_scale=scale, found_inf=found_inf, backend="cuda")
        memory = cuda.given
        cuda.numbers_on_device = False
        for t in range(4):
            counts = t != 2
            for one in eager:
                one.step, one.lr = one.step + counts, one.lr * 0.5
            lr.mul_(0.5)
            count.add_(counts)
            scale.fill_(2.0**t)
            found_inf.fill_(float(not counts))
            for kept, grad in zip(static, gradients(graphed, t), strict=True):
                kept.copy_(grad * 2.0**t)
            cuda.give(**memory)
            replay()
            if counts:
                sparse_adamw_(*given(eager, gradients(eager, t)), BETAS, EPS, seed=seed, backend="cuda")
    for a, b in zip(eager, graphed, strict=True):
        for name in ("weight", "value", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


# What is taken out or changed in the sources, and what is said then.
MISTAKES = {
    "no barrier": ("__syncthreads();", "", "race|uninitialized: .* shared memory"),
    "a block too many": (
        "(blockIdx.x - slice.first_block) * values_per_block",
        "(blockIdx.x - slice.first_block) / 2 * values_per_block",
        "race: reads .*, which thread 0 of block 1 wrote",
    ),
    "whole vectors at the end": (
        "if (aligned && offset + 4 <= size) return",
        "if (aligned) return",
        r"out of bounds: reads 16 bytes of \w+\[0\] at byte 6384 of 6392",
    ),
    "vectors anywhere": (
        "slice.aligned = multiple_of(slice.value, 16) && multiple_of(slice.grad, 16)",
        "slice.aligned = true",
        r"misaligned: (reads|writes) 16 bytes of grads\[0\]",
    ),
    "numbers of the host": (
        "if (!given.lr.is_cuda()) numbers.lr = nullptr;",
        "",
        "out of bounds: reads 8 bytes",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_kernel_is_found(name: str) -> None:
    old, new, message = MISTAKES[name]
    cuda = library(operators(changes=((old, new),)))
    mine = [layer((94, 17), 1, 17, torch.float32), layer((300, 40), 0, 200, torch.bfloat16)]
    grads = gradients(mine, 0)
    if name == "vectors anywhere":
        grads = [torch.empty(grad.numel() + 1)[1:].copy_(grad.flatten()).view(grad.shape) for grad in grads]
    with cuda.as_backend("sparse_optimizer"), pytest.raises(ValueError, match=message):
        step(mine, "cuda", grads=grads)


def test_nothing_is_found_without_one() -> None:
    mine = [layer((94, 17), 1, 17, torch.float32), layer((300, 40), 0, 200, torch.bfloat16)]
    before = [bits(one.weight).clone() for one in mine]
    with library(operators()).as_backend("sparse_optimizer"):
        step(mine, "cuda")
        stochastic_step(mine, "cuda", gradients(mine, 1))
    assert not any(torch.equal(bits(one.weight), old) for one, old in zip(mine, before, strict=True))
