from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from clue_fast.ops import sparse_sgd_

OPERATOR = "sparse_sgd"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MOMENTUM = pytest.mark.parametrize("momentum", [0.0, 0.9])


@dataclass
class Layers:
    """Weights of several shapes, with rows or columns selected, each with its own rate and decay."""

    weights: list[Tensor]
    indices: list[Tensor]
    values: list[Tensor]
    momenta: list[Tensor]
    grads: list[Tensor]
    dims: list[int]
    steps: int = 0

    @classmethod
    def make(cls, dtype: torch.dtype, device: torch.device) -> Layers:
        dims, weights, indices = [], [], []
        for shape in ((1, 1), (5, 37), (300, 71), (32, 1030)):
            for dim in (0, 1):
                dims.append(dim)
                weights.append(torch.randn(shape).to(dtype).to(device))
                count = (shape[dim] + 2) // 3
                indices.append(torch.randperm(shape[dim])[:count].sort().values.to(device))
        values = [w.index_select(d, i).float() for w, i, d in zip(weights, indices, dims, strict=True)]
        momenta, grads = [torch.zeros_like(v) for v in values], [torch.randn_like(v) for v in values]
        return cls(weights, indices, values, momenta, grads, dims)

    def step(self, momentum: float, backend: str, masters: bool = True, seed: Tensor | None = None, **kwargs) -> None:
        """Gradients that change from step to step."""
        self.steps += 1
        lr, decay = self.rates()
        count = len(self.weights)
        sparse_sgd_(
            self.values if masters else None,
            [grad * self.steps for grad in self.grads],
            self.momenta if momentum else None,
            self.weights,
            self.indices,
            self.dims,
            lr,
            decay,
            torch.full((count,), self.steps),
            momentum,
            seed=seed,
            backend=backend,
            **kwargs,
        )

    def rates(self) -> tuple[Tensor, Tensor]:
        count = len(self.weights)
        numbers = torch.arange(count, dtype=torch.float64)
        return 1e-3 * (1 + numbers), 0.02 * numbers

    def selected(self) -> list[Tensor]:
        return [w.index_select(d, i) for w, i, d in zip(self.weights, self.indices, self.dims, strict=True)]

    def outside(self) -> list[Tensor]:
        parts = []
        for weight, index, dim in zip(self.weights, self.indices, self.dims, strict=True):
            rest = torch.ones(weight.shape[dim], dtype=torch.bool)
            rest[index.cpu()] = False
            parts.append(weight.cpu().index_select(dim, rest.nonzero().flatten()))
        return parts


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@MOMENTUM
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_torch_sgd(backend: str, device: torch.device, dtype: torch.dtype, momentum: float) -> None:
    layers = Layers.make(dtype, device)
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
def test_stochastic_rounding(backend: str, device: torch.device, momentum: float) -> None:
    """Without masters: between the neighbors of the float32 values, on their mean, and the same for one seed."""
    exact = Layers.make(torch.float32, device)
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


@MOMENTUM
def test_float32_weights_scale_and_found_inf(backend: str, device: torch.device, momentum: float) -> None:
    plain = Layers.make(torch.float32, device)
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
def test_same_bits_for_every_number_of_threads(
    backend: str, device: torch.device, two_threads: None, momentum: float
) -> None:
    first = Layers.make(torch.bfloat16, device)
    second = copy.deepcopy(first)
    for threads, layers in ((2, first), (1, second)):
        torch.set_num_threads(threads)
        for _ in range(3):
            layers.step(momentum, backend)
    assert same(first.weights, second.weights) and same(first.momenta, second.momenta)


def test_opcheck(backend: str, device: torch.device) -> None:
    layers = Layers.make(torch.bfloat16, device)
    numbers = (*layers.rates(), torch.full((len(layers.weights),), 1))
    lists = (layers.values, layers.grads, layers.momenta, layers.weights, layers.indices, layers.dims)
    operator = torch.ops.clue_fast.sparse_sgd_.default
    torch.library.opcheck(operator, (*lists, *numbers, None, None, None, 0.9, backend))


def test_bad_input() -> None:
    layers = Layers.make(torch.bfloat16, torch.device("cpu"))
    with pytest.raises(ValueError, match="give both or neither"):
        numbers = (*layers.rates(), torch.full((len(layers.weights),), 1))
        sparse_sgd_(layers.values, layers.grads, None, layers.weights, layers.indices, layers.dims, *numbers, 0.9)
    with pytest.raises(ValueError, match="16-bit weights need"):
        layers.step(0.9, "reference", masters=False)
    layers.grads[2] = layers.grads[2].bfloat16()
    with pytest.raises(ValueError, match=r"grads\[2\] must be contiguous"):
        layers.step(0.9, "reference")
