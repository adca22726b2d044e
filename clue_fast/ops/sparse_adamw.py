"""AdamW on selected rows or columns of many weights in one call, with float32 master values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clue_fast.ops import backend as backends


# The definition: the launch function in plain PyTorch.


def reference(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    rates, decays, steps = lr.tolist(), weight_decay.tolist(), step.tolist()
    for i, (value, grad, exp_avg, exp_avg_sq) in enumerate(zip(values, grads, exp_avgs, exp_avg_sqs, strict=True)):
        correction1, correction2 = 1 - beta1 ** steps[i], 1 - beta2 ** steps[i]
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(correction2)).add_(eps)
        value.mul_(1 - rates[i] * decays[i]).addcdiv_(exp_avg, denominator, value=-rates[i] / correction1)
        weights[i].index_copy_(dims[i], indices[i], value.to(weights[i].dtype))


backends.register("sparse_adamw", ("reference", "cpp", "cuda"), {"sparse_adamw": reference})


# Schema and fake, for torch.compile.

library = torch.library.Library("clue_fast", "FRAGMENT")
library.define(
    "sparse_adamw_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] weights, Tensor[] indices, int[] dims, Tensor lr, Tensor weight_decay, Tensor step, "
    "float beta1, float beta2, float eps, str? backend=None) -> ()"
)


@torch.library.impl(library, "sparse_adamw_", "CompositeExplicitAutograd")
def _step(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str | None = None,
) -> None:
    launch = backends.launch("sparse_adamw", "sparse_adamw", weights[0].device, backend)
    launch(
        values, grads, exp_avgs, exp_avg_sqs, weights, indices, dims, lr, weight_decay, step, beta1, beta2, eps
    )


@torch.library.register_fake("clue_fast::sparse_adamw_", lib=library)
def _fake(*_: object) -> None:
    return None


@torch.no_grad()
def sparse_adamw_(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    *,
    backend: str | None = None,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on the selected part of each weight, in place.

    The rest of the weight is neither read nor written. The selected part lives in `values`, in float32, and is
    rounded to nearest even into the weight, so that updates below the weight's own resolution are not lost.

    Args:
        values: float32 master of the selected part, shaped as weight.index_select(dim, index).
        grads, exp_avgs, exp_avg_sqs: float32, shaped as values.
        weights: the full weights [out_features, in_features], float32, bfloat16 or float16, contiguous.
        indices: int64, sorted, unique, in range (not checked here).
        dims: 0 for rows, 1 for columns.
        lr, weight_decay: float64 [number of weights], on CPU.
        step: int64 [number of weights], on CPU; the number of this step, so 1 in the first.
        betas: decay of the two moments.
        eps: added to the denominator.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: lengths, shapes or dtypes do not fit.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    if not weights:
        return
    _check(values, grads, exp_avgs, exp_avg_sqs, weights, indices, dims, lr, weight_decay, step)
    run = torch.ops.clue_fast.sparse_adamw_ if torch.compiler.is_compiling() else _step
    run(
        values, grads, exp_avgs, exp_avg_sqs, weights, indices, dims, lr, weight_decay, step, *betas, eps, backend
    )


def _check(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
) -> None:
    n = len(weights)
    lengths = {len(column) for column in (values, grads, exp_avgs, exp_avg_sqs, indices, dims)}
    if lengths != {n}:
        raise ValueError(f"{n} weights, but other arguments have lengths {sorted(lengths)}")
    for name, tensor, dtype in (
        ("lr", lr, torch.float64),
        ("weight_decay", weight_decay, torch.float64),
        ("step", step, torch.int64),
    ):
        if tensor.shape != (n,) or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {dtype} [{n}] on CPU, not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
