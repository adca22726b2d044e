"""Traces of a module: its own forward with made-up projections, to see what it computes between them.

The stub of a projection returns values that were chosen beforehand, and keeps what it was given. Norms pass
on what they get, and so does whatever else has weights; attention may return more than that. Vectors of the module's
own are ones. So the arithmetic of a module is observed without any of its weights: on every device, sharded, quantized
or not loaded at all, at any size in a fraction of a millisecond.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.internals import NO_TORCH_FUNCTION, own_parameters, variant


@dataclass(frozen=True)
class Trace:
    """What came of one run.

    Attributes:
        inputs: what each projection that was called was given, by its name, [tokens, inputs].
        output: what the module returned.
    """

    inputs: dict[str, Tensor]
    output: Any


@torch.no_grad()
def trace_with_stubs(
    module: nn.Module,
    arguments: Sequence[Tensor],
    outputs: Mapping[str, Tensor],
    *,
    training: bool = False,
    dropout: float = 1.0,
    blocks: float = 1.0,
    until: str | None = None,
) -> Trace:
    """Runs the forward of a module's class with stubs for its children.

    Args:
        module: stays as it is; its children without weights, such as activations but for norms, take part.
        arguments: given for the arguments that forward requires, float32 [1, tokens, channels].
        outputs: what the projections of these names are to return, float32 [tokens, outputs].
        training: run as in training.
        dropout: what the module's own dropout layers multiply by.
        blocks: what its children with matrices of their own that are no projections multiply by.
        until: name of the projection to stop at, if what comes after it does not matter; ``output`` is None then.

    Raises:
        Exception: whatever the forward raises.
    """
    stubs = {name: _Stub(values, name == until) for name, values in outputs.items()}
    fixed: dict[str, nn.Module] = {**stubs}
    passing = []
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            fixed.setdefault(name, _Scale(dropout))
        elif name not in fixed and (dimensions := [p.dim() for p in child.parameters()]):
            fixed[name] = nn.Identity()
            passing += [name] if max(dimensions) > 1 else []
        elif name not in fixed and _is_norm(child):
            fixed[name] = nn.Identity()
    own = {name: torch.ones(p.shape, device="cpu") for name, p in own_parameters(module).items() if p.dim() <= 1}
    # How many things attention returns shows when they are unpacked.
    attempts = (2, 3) if passing else (1,)
    output = None
    for extra in attempts:
        children = fixed | {name: _PassOn(extra, blocks) for name in passing}
        stubbed = variant(module, own, children, training=training)
        try:
            with torch.random.fork_rng(devices=[]):
                output = type(stubbed).forward(stubbed, *arguments)
            break
        except _ReachedError:
            break
        except Exception:
            if extra == attempts[-1]:
                raise
    inputs = {name: stub.seen.flatten(0, -2) for name, stub in stubs.items() if stub.seen is not None}
    return Trace(inputs, output)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module without weights shifts and scales each token as a whole."""
    x = sample(1, 3, 8, seed=0)
    try:
        y = module(x)
        steps = (y - y[..., :1])[..., 1:] / (x - x[..., :1])[..., 1:]
        return torch.allclose(steps, steps[..., :1].expand_as(steps), rtol=1e-4)
    except Exception:  # whatever takes other arguments takes part as it is
        return False


def required_arguments(module: nn.Module) -> int:
    """Returns how many arguments the forward of a module's class cannot do without, at least 1."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters))


def sample(*shape: int, seed: int) -> Tensor:
    """Returns values spread over [-6, 6], where activations differ from each other, float32, the same every time."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), device="cpu") * 12.0 - 6.0


class _ReachedError(Exception):
    """The projection to stop at was called."""


class _Stub(nn.Module):
    def __init__(self, values: Tensor, last: bool) -> None:
        super().__init__()
        self.values, self.last = values, last
        self.weight = values.new_empty(0)  # some modules cast to its dtype
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        if self.last:
            raise _ReachedError
        return self.values.reshape(*x.shape[:-1], -1)


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class _PassOn(nn.Module):
    def __init__(self, count: int, factor: float) -> None:
        super().__init__()
        self.count, self.factor = count, factor

    def forward(self, *args: Tensor, **kwargs: Any) -> _First:
        x = (args[0] if args else next(iter(kwargs.values()))) * self.factor
        first = x.as_subclass(_First)
        first.returned = (x, *[None] * (self.count - 1))
        return first


class _First(Tensor):
    """The first of several things returned: used as a tensor it is that one, unpacked or indexed it is all of them."""

    returned: tuple[Tensor | None, ...]
    __torch_function__ = NO_TORCH_FUNCTION  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter(self.returned)

    def __getitem__(self, index: Any) -> Any:
        return self.returned[index] if isinstance(index, (int, slice)) else super().__getitem__(index)
