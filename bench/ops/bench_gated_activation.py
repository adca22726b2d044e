"""The gated activation alone, with statistics, and against what PyTorch does instead.

`hooks` collects the same five statistics in a forward hook of the module that follows, from the finished activation,
every token in one group, which spares it the sorting by group.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.interleaved import Case, Comparison, Target
from clue_fast import ops

TOKENS, CHANNELS = 2048, 4096
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


class Activation(nn.Module):
    """What a model runs: the activation and the product, then the module that a hook is put on."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.act = ACTIVATIONS[activation]
        self.down = nn.Identity()

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(self.act(gate) * up)


def collect(activation: Tensor, sums: Tensor) -> None:
    """The statistics of clue_fast as one would write them in PyTorch."""
    h = activation.float()
    magnitude = h.abs()
    sums[0] += h.sum(0)
    sums[1] += h.square().sum(0)
    sums[2] += magnitude.sum(0)
    torch.maximum(sums[3], magnitude.amax(0), out=sums[3])
    sums[4] += (h > 0).sum(0)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(TOKENS, CHANNELS).to(dtype), torch.randn(TOKENS, CHANNELS).to(dtype)


def cases(activation: str, dtype: torch.dtype) -> dict[str, Case]:
    """Forward, without autograd, all on the same gate and up."""
    gate, up = inputs(dtype)
    statistics, sums = torch.zeros(2, 5, CHANNELS, dtype=torch.float64), torch.zeros(5, CHANNELS, dtype=torch.float64)
    one = torch.ones(TOKENS, dtype=torch.int8)
    records = torch.randint(0, 3, (TOKENS // 64,), dtype=torch.int8).repeat_interleave(64)  # of 64 tokens each
    eager, hooked, compiled = Activation(activation), Activation(activation), Activation(activation)
    hooked.down.register_forward_hook(lambda _, inputs, __: collect(inputs[0], sums))
    compiled.compile()
    return {
        "plain": lambda: ops.gated_activation(gate, up, activation),
        "statistics": lambda: ops.gated_activation(gate, up, activation, group=one, statistics=statistics),
        "statistics, two groups": lambda: ops.gated_activation(
            gate, up, activation, group=records, statistics=statistics
        ),
        "eager": lambda: eager(gate, up),
        "hooks": lambda: hooked(gate, up),
        "compiled": lambda: compiled(gate, up),
    }


def backward_cases(activation: str, dtype: torch.dtype) -> dict[str, Case]:
    """Backward alone, of one forward each."""
    gate, up = (x.requires_grad_() for x in inputs(dtype))
    grad = torch.randn(TOKENS, CHANNELS).to(dtype)
    group = torch.ones(TOKENS, dtype=torch.int8)
    attribution = torch.zeros(2, 3, CHANNELS, dtype=torch.float64)
    outputs = {
        "plain": ops.gated_activation(gate, up, activation),
        "attribution": ops.gated_activation(gate, up, activation, group=group, gradient_statistics=attribution),
        "eager": Activation(activation)(gate, up),
    }

    def backward(h: Tensor) -> object:
        return torch.autograd.grad(h, (gate, up), grad, retain_graph=True)

    return {name: lambda h=h: backward(h) for name, h in outputs.items()}


def title(direction: str, activation: str, dtype: torch.dtype) -> str:
    return f"gated_activation {direction}, {activation}, {TOKENS} x {CHANNELS}, {str(dtype)[6:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_forward(compare, activation: str, dtype: torch.dtype) -> None:
    """With its targets."""
    targets = [Target("statistics", "plain", 1.05), Target("statistics", "eager", 1.0)]
    with torch.no_grad():
        compare(Comparison(title("forward", activation, dtype), cases(activation, dtype), targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_backward(compare, activation: str, dtype: torch.dtype) -> None:
    targets = [Target("attribution", "eager", 1.0)]
    compare(Comparison(title("backward", activation, dtype), backward_cases(activation, dtype), targets))
