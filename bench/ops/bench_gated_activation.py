"""The gated activation alone, with statistics, and against what PyTorch does instead.

`hooks` collects the same five statistics in a forward hook of the module that follows, from the finished activation,
every token in one group, which spares it the sorting by group; `moments` are the sums that the criterion `difference`
asks for. On a GPU Liger takes part where it is installed, and a copy of half of what the activation moves: what memory
allows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import liger, machine
from bench.interleaved import Case, Comparison, Target
from clue_fast import ops

CHANNELS = 4096
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


def tokens() -> int:
    """More than the caches hold, on a GPU too."""
    return 16384 if machine.on_gpu() else 2048


def activations(dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens(), CHANNELS, device=machine.device()).to(dtype)


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return activations(dtype), activations(dtype)


def groups(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each token: all the same, and records of 64 tokens that are counted for one of two or for none."""
    of_records = torch.randint(0, 3, (tokens() // 64,), dtype=torch.int8, device=device)
    return torch.ones(tokens(), dtype=torch.int8, device=device), of_records.repeat_interleave(64)


def cases(activation: str, dtype: torch.dtype) -> dict[str, Case]:
    """Forward, without autograd, all on the same gate and up."""
    gate, up = inputs(dtype)
    statistics, sums = (torch.zeros(*n, 5, CHANNELS, dtype=torch.float64, device=gate.device) for n in ([2], []))
    one, records = groups(gate.device)
    eager, hooked, compiled = Activation(activation), Activation(activation), Activation(activation)
    hooked.down.register_forward_hook(lambda _, inputs, __: collect(inputs[0], sums))
    compiled.compile()
    made: dict[str, Case] = {
        "plain": lambda: ops.gated_activation(gate, up, activation),
        "statistics": lambda: ops.gated_activation(gate, up, activation, group=one, statistics=statistics),
        "statistics, two groups": lambda: ops.gated_activation(
            gate, up, activation, group=records, statistics=statistics
        ),
        "moments": lambda: ops.gated_activation(gate, up, activation, group=one, statistics=statistics, sums="moments"),
        "eager": lambda: eager(gate, up),
        "hooks": lambda: hooked(gate, up),
        "compiled": lambda: compiled(gate, up),
    }
    if machine.on_gpu():
        out = torch.empty_like(gate)
        made["copy"] = lambda: out.copy_(gate)
        if liger.available():
            made["liger"] = lambda: liger.gated_activation(gate, up, activation)
    return made


def backward_cases(activation: str, dtype: torch.dtype) -> dict[str, Case]:
    """Backward alone, of one forward each."""
    gate, up = (x.requires_grad_() for x in inputs(dtype))
    grad = activations(dtype)
    group, _ = groups(grad.device)
    attribution = torch.zeros(2, 3, CHANNELS, dtype=torch.float64, device=grad.device)
    outputs = {
        "plain": ops.gated_activation(gate, up, activation),
        "attribution": ops.gated_activation(gate, up, activation, group=group, gradient_statistics=attribution),
        "eager": Activation(activation)(gate, up),
    }
    if machine.on_gpu() and liger.available():
        outputs["liger"] = liger.gated_activation(gate, up, activation)

    def backward(h: Tensor) -> object:
        return torch.autograd.grad(h, (gate, up), grad, retain_graph=True)

    return {name: lambda h=h: backward(h) for name, h in outputs.items()}


def title(direction: str, activation: str, dtype: torch.dtype) -> str:
    return f"gated_activation {direction}, {activation}, {tokens()} x {CHANNELS}, {str(dtype)[6:]}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_forward(compare, activation: str, dtype: torch.dtype) -> None:
    """With its targets."""
    targets = [Target(case, "plain", 1.03) for case in ("statistics", "moments")]
    if machine.on_gpu():  # two reads and a write at 90 % of the speed of a read and a write
        targets.append(Target("plain", "copy", 1.5 / 0.9))
    else:
        targets.append(Target("statistics", "eager", 1.0))
    with torch.no_grad():
        compare(Comparison(title("forward", activation, dtype), cases(activation, dtype), targets))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def bench_backward(compare, activation: str, dtype: torch.dtype) -> None:
    targets = [Target("attribution", "eager", 1.0)]
    compare(Comparison(title("backward", activation, dtype), backward_cases(activation, dtype), targets))
