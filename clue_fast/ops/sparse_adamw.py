"""AdamW on selected rows or columns of many weights in one call, with float32 master values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clue_fast.ops import backend as backends
from clue_fast.ops.library import define

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
    """One step; the arguments are those of `sparse_adamw_`."""
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
        values,
        grads,
        exp_avgs,
        exp_avg_sqs,
        weights,
        indices,
        dims,
        lr,
        weight_decay,
        step,
        beta1,
        beta2,
        eps,
    )


def _fake(*_: object) -> None:
    return None


define(
    "sparse_adamw_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] weights, Tensor[] indices, int[] dims, Tensor lr, Tensor weight_decay, Tensor step, "
    "float beta1, float beta2, float eps, str? backend=None) -> ()",
    _step,
    _fake,
)


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
    """One step of AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on the selected part of each weight.

    In place; the rest of the weight keeps its bits. The selected part lives in `values`, in float32, and is
    rounded to nearest even into the weight, so that updates below the weight's resolution are not lost.

    Args:
        values: float32 master of the selected part, shaped as weight.index_select(dim, index).
        grads: float32, shaped as values.
        exp_avgs: first moments, float32, shaped as values.
        exp_avg_sqs: second moments, float32, shaped as values.
        weights: the full weights [out_features, in_features], float32, bfloat16 or float16, contiguous.
        indices: int64, sorted, unique, in range (not checked here).
        dims: 0 for rows, 1 for columns.
        lr: float64 [number of weights], on CPU.
        weight_decay: float64 [number of weights], on CPU.
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
    _check(values, grads, exp_avgs, exp_avg_sqs, weights, indices, dims)
    _check_rates(len(weights), lr, weight_decay, step)
    if torch.compiler.is_compiling():
        torch.ops.clue_fast.sparse_adamw_(
            values,
            grads,
            exp_avgs,
            exp_avg_sqs,
            weights,
            indices,
            dims,
            lr,
            weight_decay,
            step,
            *betas,
            eps,
            backend,
        )
        return
    _step(
        values,
        grads,
        exp_avgs,
        exp_avg_sqs,
        weights,
        indices,
        dims,
        lr,
        weight_decay,
        step,
        *betas,
        eps,
        backend,
    )
    # A launch function writes unseen by autograd; a backward that still needs the old weights must notice.
    torch.autograd.graph.increment_version([*weights, *values])


def _check(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
) -> None:
    n = len(weights)
    lengths = [len(column) for column in (values, grads, exp_avgs, exp_avg_sqs, indices, dims)]
    if lengths != [n] * 6:
        raise ValueError(
            f"{n} weights, but values, grads, exp_avgs, exp_avg_sqs, indices and dims have lengths {lengths}"
        )
    for i, (weight, index, dim) in enumerate(zip(weights, indices, dims, strict=True)):
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(f"weight {i} must be contiguous [out_features, in_features], not {list(weight.shape)}")
        if dim not in (0, 1):
            raise ValueError(f"dims[{i}] must be 0 for rows or 1 for columns, not {dim}")
        if index.dtype != torch.int64:
            raise ValueError(f"indices[{i}] must be int64, not {index.dtype}")
        rows, columns = weight.shape
        shape = (index.shape[0], columns) if dim == 0 else (rows, index.shape[0])
        for tensor in (values[i], grads[i], exp_avgs[i], exp_avg_sqs[i]):
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"values, grads and moments of weight {i} must be contiguous {list(shape)} float32, "
                    f"not {list(tensor.shape)} {tensor.dtype}"
                )


def _check_rates(n: int, lr: Tensor, weight_decay: Tensor, step: Tensor) -> None:
    for name, tensor, dtype in (
        ("lr", lr, torch.float64),
        ("weight_decay", weight_decay, torch.float64),
        ("step", step, torch.int64),
    ):
        if tensor.shape != (n,) or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {dtype} [{n}] on CPU, not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
