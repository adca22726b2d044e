"""AdamW on selected rows or columns of many weights in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clue_fast.ops import backend as backends
from clue_fast.ops import selected_update as selected
from clue_fast.ops.backend import define

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
    seed: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step; the arguments are those of `sparse_adamw_`, with no values for values of None."""
    if found_inf is not None and found_inf.item():
        return
    rates, decays, steps = lr.tolist(), weight_decay.tolist(), step.tolist()
    for i, (grad, exp_avg, exp_avg_sq, weight) in enumerate(zip(grads, exp_avgs, exp_avg_sqs, weights, strict=True)):
        if grad_scale is not None:
            grad = grad / grad_scale
        value = values[i] if values else weight.index_select(dims[i], indices[i]).float()
        correction1, correction2 = 1 - beta1 ** steps[i], 1 - beta2 ** steps[i]
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(correction2)).add_(eps)
        value.mul_(1 - rates[i] * decays[i]).addcdiv_(exp_avg, denominator, value=-rates[i] / correction1)
        selected.write(weight, dims[i], indices[i], value, None if seed is None else int(seed[i]), steps[i])


backends.register("sparse_adamw", ("reference", "cpp", "cuda"), {"sparse_adamw": reference})


# Schema and fake, for torch.compile.


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
    seed: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str | None = None,
) -> None:
    launch = backends.launch("sparse_adamw", "sparse_adamw", weights[0].device, backend)
    lists = (values, grads, exp_avgs, exp_avg_sqs, weights, indices, dims)
    launch(*lists, lr, weight_decay, step, seed, grad_scale, found_inf, beta1, beta2, eps)


def _fake(*_: object) -> None:
    return None


define(
    "sparse_adamw_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] weights, Tensor[] indices, int[] dims, Tensor lr, Tensor weight_decay, Tensor step, "
    "Tensor? seed, Tensor? grad_scale, Tensor? found_inf, float beta1, float beta2, float eps, "
    "str? backend=None) -> ()",
    _step,
    _fake,
)


@torch.no_grad()
def sparse_adamw_(
    values: Sequence[Tensor] | None,
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
    seed: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on the selected part of each weight.

    In place; the rest of the weight keeps its bits. Updates below the resolution of a 16-bit weight are not
    lost: either the selected part lives in `values`, in float32, and is rounded to nearest even into the
    weight; or, without values, it lives in the weight alone and is rounded stochastically, with random bits
    that are a function of seed, step and position, the same on every backend. Float32 weights need neither.

    A weight is anything with two dimensions: that of a linear layer ([out_features, in_features]), of a Conv1D
    ([in_features, out_features], so that output features are columns), of one expert, of all experts flattened
    to rows, or a bias as [features, 1].

    Args:
        values: float32 master of the selected part, shaped as weight.index_select(dim, index); or None.
        grads: float32, shaped as the selected part.
        exp_avgs: first moments, float32, shaped as the selected part.
        exp_avg_sqs: second moments, float32, shaped as the selected part.
        weights: the full weights, float32, bfloat16 or float16, contiguous.
        indices: int64, sorted, unique, in range (not checked here).
        dims: 0 for rows, 1 for columns, of the weight as it is stored.
        lr: float64 [number of weights], on CPU, or where the weights are (then CUDA graphs follow its changes).
        weight_decay: likewise.
        step: int64 [number of weights], likewise; the number of this step, so 1 in the first.
        betas: decay of the two moments.
        eps: added to the denominator.
        seed: int64 [number of weights], likewise; for 16-bit weights without values.
        grad_scale: one float32 by which the gradients are divided, where the weights are.
        found_inf: one float32; if it is not 0, nothing changes. The caller then takes back its step.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: lengths, shapes or dtypes do not fit, or 16-bit weights have neither values nor seed.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    if not weights:
        return
    moments = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    selected.check(weights, indices, dims, values, moments)
    selected.check_settings(weights, values, lr, weight_decay, step, seed, grad_scale, found_inf)
    run = torch.ops.clue_fast.sparse_adamw_ if torch.compiler.is_compiling() else _step
    lists = (values or [], grads, exp_avgs, exp_avg_sqs, weights, indices, dims)
    run(*lists, lr, weight_decay, step, seed, grad_scale, found_inf, *betas, eps, backend)
    if not torch.compiler.is_compiling():
        selected.written(weights, values)
