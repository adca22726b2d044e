"""A down projection kept transposed in memory, so that its selected columns are rows there, against how it is stored.

What training does with it: the product, the gradient of its input and of the selected columns, the step; and the
product alone of one token, as generation takes it. ``docs/performance.md`` says why the package leaves weights as they
are.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import machine
from bench.interleaved import Case, Comparison, Target
from bench.ops.bench_sparse_optimizer import FRACTION, selected
from clue_fast.ops import backend as backends

WEIGHTS, FEATURES, UNITS = 8, 1024, 2816
"""Of all of them, 92 MB in float32, a cache holds none from one use to the next."""
TRAINING = [(tokens, dtype) for tokens in (128, 1024) for dtype in (torch.float32, torch.bfloat16)]
GENERATION = [(1, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]


def weights_of(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(FEATURES, UNITS, device=machine.device()).mul_(0.02).to(dtype) for _ in range(WEIGHTS)]


def generated(weights: list[Tensor], x: Tensor) -> Case:
    """The product with every weight."""

    def case() -> None:
        with torch.no_grad():
            for weight in weights:
                linear(x, weight)

    return case


def trained(weights: list[Tensor], x: Tensor, transposed: bool) -> Case:
    """All of a training step that the layout touches; weights are [features, units] either way."""
    grad = torch.randn(len(x), FEATURES, device=x.device).to(x.dtype)
    kept = x[:, : round(FRACTION * UNITS)].contiguous()
    shape = (FEATURES, kept.shape[1])
    found = torch.empty(shape[::-1], device=x.device).t() if transposed else torch.empty(shape, device=x.device)
    backward = backends.launch_for("sparse_linear", "sparse_linear_backward", grad, None)
    in_memory = [weight.t() for weight in weights] if transposed else weights
    step = selected(in_memory, dim=0 if transposed else 1, masters=x.dtype != torch.float32)

    def case() -> None:
        with torch.no_grad():
            for weight in weights:
                linear(x, weight)
                grad @ weight
                backward(grad, kept, None, found)
            step()

    return case


def cases(tokens: int, dtype: torch.dtype) -> dict[str, Case]:
    """One token is generated, more are trained on."""
    stored = weights_of(dtype)
    transposed = [weight.t().contiguous().t() for weight in stored]
    x = torch.randn(tokens, UNITS, device=machine.device()).to(dtype)
    if tokens == 1:
        return {"as stored": generated(stored, x), "transposed": generated(transposed, x)}
    return {"as stored": trained(stored, x, False), "transposed": trained(transposed, x, True)}


def title(tokens: int, dtype: torch.dtype) -> str:
    what = "product of 1 token" if tokens == 1 else f"training step of {tokens} tokens"
    return f"down projections of {FEATURES} x {UNITS}, {what}, {str(dtype)[6:]}"


@pytest.mark.parametrize(("tokens", "dtype"), [*TRAINING, *GENERATION], ids=str)
def bench_columns_as_rows(compare, tokens: int, dtype: torch.dtype) -> None:
    compare(Comparison(title(tokens, dtype), cases(tokens, dtype), [Target("transposed", "as stored", 1.0)]))
