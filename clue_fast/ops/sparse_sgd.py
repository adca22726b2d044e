"""Stochastic gradient descent on selected rows or columns of many weights in one call."""

from __future__ import annotations

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
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    seed: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
) -> None:
    """One step; the arguments are those of `sparse_sgd_`, with empty lists for None."""
    if found_inf is not None and found_inf.item():
        return
    rates, decays, steps = lr.tolist(), weight_decay.tolist(), step.tolist()
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        value = values[i] if values else weight.index_select(dims[i], indices[i]).float()
        if grad_scale is not None:
            grad = grad / grad_scale
        direction = grad.add(value, alpha=decays[i])
        if momentum:
            direction = momenta[i].mul_(momentum).add_(direction)
        value.add_(direction, alpha=-rates[i])
        selected.write(weight, dims[i], indices[i], value, None if seed is None else int(seed[i]), steps[i])


backends.register("sparse_sgd", ("reference", "cpp", "cuda"), {"sparse_sgd": reference})


# Schema and fake, for torch.compile.


def _step(
    values: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    seed: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    momentum: float,
    backend: str | None = None,
) -> None:
    launch = backends.launch("sparse_sgd", "sparse_sgd", weights[0].device, backend)
    lists = (values, grads, momenta, weights, indices, dims)
    launch(*lists, lr, weight_decay, step, seed, grad_scale, found_inf, momentum)


def _fake(*_: object) -> None:
    return None


define(
    "sparse_sgd_(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] weights, Tensor[] indices, "
    "int[] dims, Tensor lr, Tensor weight_decay, Tensor step, Tensor? seed, Tensor? grad_scale, Tensor? found_inf, "
    "float momentum, str? backend=None) -> ()",
    _step,
    _fake,
)


@torch.no_grad()
def sparse_sgd_(
    values: Sequence[Tensor] | None,
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    dims: Sequence[int],
    lr: Tensor,
    weight_decay: Tensor,
    step: Tensor,
    momentum: float = 0.0,
    *,
    seed: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One step of stochastic gradient descent on the selected part of each weight, as `torch.optim.SGD` takes it.

    The weight decay is added to the gradient, times the value; the momentum is not dampened (Sutskever et al.
    2013). Everything else is as in `sparse_adamw_`: what is written, master values or stochastic rounding, the
    kinds of weights.

    Args:
        values: float32 master of the selected part, shaped as weight.index_select(dim, index); or None.
        grads: float32, shaped as the selected part.
        momenta: float32, shaped as the selected part, zero at first; None without momentum.
        weights: the full weights, float32, bfloat16 or float16, contiguous, with two dimensions.
        indices: int64, sorted, unique, in range (not checked here).
        dims: 0 for rows, 1 for columns, of the weight as it is stored.
        lr: float64 [number of weights], on CPU, or where the weights are.
        weight_decay: likewise.
        step: int64 [number of weights], likewise; the number of this step, for stochastic rounding.
        momentum: how much of the last direction is kept.
        seed: int64 [number of weights], likewise; for 16-bit weights without values.
        grad_scale: one float32 by which the gradients are divided, where the weights are.
        found_inf: one float32; if it is not 0, nothing changes.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: lengths, shapes or dtypes do not fit, or 16-bit weights have neither values nor seed.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    if not weights:
        return
    if (momenta is None) != (momentum == 0.0):
        raise ValueError("momenta go with a momentum above 0; give both or neither")
    others = {"grads": grads, **({} if momenta is None else {"momenta": momenta})}
    selected.check(weights, indices, dims, values, others)
    selected.check_settings(weights, values, lr, weight_decay, step, seed, grad_scale, found_inf)
    run = torch.ops.clue_fast.sparse_sgd_ if torch.compiler.is_compiling() else _step
    lists = (values or [], grads, momenta or [], weights, indices, dims)
    run(*lists, lr, weight_decay, step, seed, grad_scale, found_inf, momentum, backend)
    if not torch.compiler.is_compiling():
        selected.written(weights, values)
