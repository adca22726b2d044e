"""Weights with a selected part, as the tests of the optimizers and of their rounding take them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clue_fast.ops import sparse_adamw_, sparse_sgd_

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


def step(
    layers: list[Layer], backend: str | None, seed: int = 0, grads: list[Tensor] | None = None, **kwargs: Tensor
) -> None:
    for one in layers:
        one.step += 1
    grads = gradients(layers, seed) if grads is None else grads
    sparse_adamw_(*arguments(layers, grads), BETAS, EPS, **kwargs, backend=backend)


def stochastic_step(layers: list[Layer], backend: str | None, grads: list[Tensor], seed: int = 0) -> None:
    """One step without master values; weight i has seed + i."""
    for one in layers:
        one.step += 1
    seeds = torch.arange(seed, seed + len(layers))
    _, *others = arguments(layers, grads)
    sparse_adamw_(None, *others, BETAS, EPS, seed=seeds, backend=backend)


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


@dataclass
class SgdLayers:
    """Weights of several shapes, with rows or columns selected, each with its own rate and decay."""

    weights: list[Tensor]
    indices: list[Tensor]
    values: list[Tensor]
    momenta: list[Tensor]
    grads: list[Tensor]
    dims: list[int]
    steps: int = 0

    @classmethod
    def make(cls, dtype: torch.dtype, device: torch.device) -> SgdLayers:
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
