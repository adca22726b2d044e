"""One step of an optimizer on selected rows or columns of many weights in one call: AdamW, and SGD with momentum.

The rules differ in a few lines; everything else is the same for both. Updates below the resolution of a 16-bit weight
are not lost: either the selected part lives in `values`, in float32, and is rounded to nearest even into the weight;
or, without values, it lives in the weight alone and is rounded stochastically, with random bits that are a function of
seed, step and position, the same on every backend. Float32 weights need neither.

A weight is anything with two dimensions: that of a linear layer ([out_features, in_features]), of a Conv1D
([in_features, out_features], so that output features are columns), of one expert, of all experts flattened to rows, or
a bias as [features, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clue_fast.ops import backend as backends

MASK32, MASK64 = 2**32 - 1, 2**64 - 1


# The arguments that every rule takes, in the order of the operators. Lists have one entry per weight.


class Arguments(NamedTuple):
    """What one step is given, whatever the rule; the moments of the rule come behind `grads`, by name.

    Attributes:
        values: float32 master of the selected part, shaped as weight.index_select(dim, index); or None.
        grads: float32, shaped as the selected part.
        weights: the full weights, float32, bfloat16 or float16, contiguous, with two dimensions.
        indices: int64, sorted, unique, in range (not checked here).
        dims: 0 for rows, 1 for columns, of the weight as it is stored.
        lr: float64 [number of weights], on CPU, or where the weights are (then CUDA graphs follow its changes).
        weight_decay: likewise.
        step: int64 [number of weights], likewise; the number of this step, so 1 in the first.
        seed: int64 [number of weights], likewise; for 16-bit weights without values.
        grad_scale: one float32 by which the gradients are divided, where the weights are.
        found_inf: one float32; if it is not 0, nothing changes. The caller then takes back its step.
    """

    values: Sequence[Tensor] | None
    grads: Sequence[Tensor]
    moments: Mapping[str, Sequence[Tensor]]
    weights: Sequence[Tensor]
    indices: Sequence[Tensor]
    dims: Sequence[int]
    lr: Tensor
    weight_decay: Tensor
    step: Tensor
    seed: Tensor | None
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def flat(self, moments: Sequence[str]) -> tuple[Any, ...]:
        """As an operator takes them: every moment is an argument of its own, and what is not given an empty list."""
        return self.values or [], self.grads, *(self.moments.get(name, []) for name in moments), *self[3:]

    def check(self) -> None:
        """Raise ValueError unless all of them fit the weights, and no update of a 16-bit weight is lost."""
        _check_lists(self)
        _check_numbers(self)
        _check_scale(self)
        _check_precision(self)


SCHEMA = (
    "{name}_(Tensor(v!)[] values, Tensor[] grads, {moments}Tensor(w!)[] weights, Tensor[] indices, int[] dims, "
    "Tensor lr, Tensor weight_decay, Tensor step, Tensor? seed, Tensor? grad_scale, Tensor? found_inf, {settings}, "
    "str? backend=None) -> ()"
)


def _check_lists(given: Arguments) -> None:
    weights = given.weights
    selected = {**({} if given.values is None else {"values": given.values}), "grads": given.grads, **given.moments}
    for name, entries in {**selected, "indices": given.indices, "dims": given.dims}.items():
        if len(entries) != len(weights):
            raise ValueError(f"{len(weights)} weights, but {len(entries)} {name}")
    for i, (weight, index, dim) in enumerate(zip(weights, given.indices, given.dims, strict=True)):
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(f"weight {i} must be contiguous with two dimensions, not {list(weight.shape)}")
        if dim not in (0, 1):
            raise ValueError(f"dims[{i}] must be 0 for rows or 1 for columns, not {dim}")
        if index.dtype != torch.int64:
            raise ValueError(f"indices[{i}] must be int64, not {index.dtype}")
        rows, columns = weight.shape
        shape = (index.shape[0], columns) if dim == 0 else (rows, index.shape[0])
        for name, entries in selected.items():
            tensor = entries[i]
            if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(
                    f"{name}[{i}] must be contiguous {list(shape)} float32, not {list(tensor.shape)} {tensor.dtype}"
                )


def _check_numbers(given: Arguments) -> None:
    """One number per weight, on CPU or on the device of the weights."""
    count, device = len(given.weights), given.weights[0].device
    wanted = {"lr": (given.lr, torch.float64), "weight_decay": (given.weight_decay, torch.float64)}
    wanted["step"] = (given.step, torch.int64)
    if given.seed is not None:
        wanted["seed"] = (given.seed, torch.int64)
    for name, (tensor, dtype) in wanted.items():
        if tensor.shape != (count,) or tensor.dtype != dtype or tensor.device.type not in ("cpu", device.type):
            raise ValueError(
                f"{name} must be {dtype} [{count}] on cpu or {device.type}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _check_scale(given: Arguments) -> None:
    """Single float32 numbers where the weights are."""
    device = given.weights[0].device
    for name, tensor in (("grad_scale", given.grad_scale), ("found_inf", given.found_inf)):
        if tensor is None:
            continue
        if tensor.numel() != 1 or tensor.dtype != torch.float32 or tensor.device.type != device.type:
            raise ValueError(
                f"{name} must be one float32 on {device.type}, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )


def _check_precision(given: Arguments) -> None:
    """No update is lost: by master values or stochastic rounding, or in float32."""
    if given.values is not None and given.seed is not None:
        raise ValueError("give either values, the float32 masters, or a seed to round stochastically, not both")
    if given.values is None and given.seed is None and any(w.dtype != torch.float32 for w in given.weights):
        raise ValueError("16-bit weights need values, the float32 masters, or a seed to round stochastically")


# Stochastic rounding: up with the probability of the part that is cut off, so that the mean is exact. Its random
# bits are a hash, the same on every backend and for every number of threads.


def random_bits(shape: Sequence[int], seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """32 random bits for each element of a selected part [rows, columns], as int64.

    Two keys come from seed and step by splitmix64 (Steele, Lea & Flood 2014). The position, counted along the
    rows, is hashed with a bijection of 32 bits (Wellons 2018, lowbias32); the second key comes in half way, so
    that the numbers of two weights or steps are not shifted copies of one another.
    """
    z = (seed + step * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK64
    z ^= z >> 31
    x = (torch.arange(math.prod(shape), device=device) + (z & MASK32)) & MASK32
    x = ((x ^ x >> 16) * 0x7FEB352D) & MASK32
    x = (((x ^ x >> 15) + (z >> 32) & MASK32) * 0x846CA68B) & MASK32
    return (x ^ x >> 16).view(*shape)


def round_stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """X, float32, in another dtype; `random` holds 32 bits for each element. NaN and infinity stay what they are."""
    if dtype == torch.float32:
        return x
    bits = x.view(torch.int32).to(torch.int64) & MASK32
    if dtype == torch.bfloat16:
        rounded = (bits + (random >> 16)) >> 16
    else:
        magnitude = bits & 0x7FFFFFFF
        normal = (magnitude + (random >> 19) >> 13) - (112 << 10)
        # In units of the smallest subnormal, plus a uniform number below one, whole units are what is left.
        uniform = (random >> 9).float() * 2.0**-23
        subnormal = (x.abs().clamp(max=2.0**-14) * 2.0**24 + uniform).to(torch.int64)
        half = torch.where(magnitude < 113 << 23, subnormal, normal).clamp(max=0x7C00)
        rounded = bits >> 16 & 0x8000 | half
    signed = torch.where(rounded < 2**15, rounded, rounded - 2**16).to(torch.int16)
    return torch.where(x.isfinite(), signed.view(dtype), x.to(dtype))


# The rules, on the selected part of one weight, in place.


def update_adamw(
    value: Tensor,
    grad: Tensor,
    moments: Sequence[Tensor],
    lr: float,
    weight_decay: float,
    step: int,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    exp_avg, exp_avg_sq = moments
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(correction2)).add_(eps)
    value.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / correction1)


def update_sgd(
    value: Tensor, grad: Tensor, moments: Sequence[Tensor], lr: float, weight_decay: float, step: int, momentum: float
) -> None:
    """Stochastic gradient descent as `torch.optim.SGD` takes it, without dampening (Sutskever et al. 2013)."""
    direction = grad.add(value, alpha=weight_decay)
    if moments:
        direction = moments[0].mul_(momentum).add_(direction)
    value.add_(direction, alpha=-lr)


@dataclass(frozen=True)
class Rule:
    """One way to update; `name` is that of its launch function, and with _ that of its operator."""

    name: str
    moments: tuple[str, ...]
    settings: tuple[str, ...]
    update: Callable[..., None]

    @property
    def schema(self) -> str:
        """Of the operator in torch."""
        moments = "".join(f"Tensor({alias}!)[] {moment}, " for alias, moment in zip("ab", self.moments, strict=False))
        return SCHEMA.format(
            name=self.name, moments=moments, settings=", ".join(f"float {setting}" for setting in self.settings)
        )

    def reference(self, *arguments: Any) -> None:
        """The launch function in plain PyTorch, the definition; the arguments are those of the operator but backend."""
        values, grads, *moments = arguments[: 2 + len(self.moments)]
        weights, indices, dims, lr, weight_decay, step, seed, grad_scale, found_inf, *settings = arguments[
            2 + len(self.moments) :
        ]
        if found_inf is not None and found_inf.item():
            return
        rates, decays, steps = lr.tolist(), weight_decay.tolist(), step.tolist()
        for i, (weight, index, dim) in enumerate(zip(weights, indices, dims, strict=True)):
            grad = grads[i] if grad_scale is None else grads[i] / grad_scale
            value = values[i] if values else weight.index_select(dim, index).float()
            own = [moment[i] for moment in moments if moment]
            self.update(value, grad, own, rates[i], decays[i], steps[i], *settings)
            rounded = value.to(weight.dtype)
            if seed is not None:
                random = random_bits(value.shape, int(seed[i]), steps[i], value.device)
                rounded = round_stochastic(value, weight.dtype, random)
            weight.index_copy_(dim, index, rounded)

    def run(self, *arguments: Any) -> None:
        """What the operator does: its arguments to the launch function of the backend."""
        *given, backend = arguments if len(arguments) == self.length + 1 else (*arguments, None)
        weights = given[2 + len(self.moments)]
        backends.launch("sparse_optimizer", self.name, weights[0].device, backend)(*given)

    @property
    def length(self) -> int:
        """Number of arguments of a launch function."""
        return len(Arguments._fields) - 1 + len(self.moments) + len(self.settings)

    @torch.no_grad()
    def step(self, given: Arguments, settings: tuple[float, ...], backend: str | None) -> None:
        """Checks the arguments and takes one step."""
        if not given.weights:
            return
        given.check()
        backends.run(f"{self.name}_", self.run, *given.flat(self.moments), *settings, backend)
        if not torch.compiler.is_compiling():
            # Autograd does not learn it from a launch function: a backward that still needs the old weights must.
            torch.autograd.graph.increment_version([*given.weights, *(given.values or ())])


ADAMW = Rule("sparse_adamw", ("exp_avgs", "exp_avg_sqs"), ("beta1", "beta2", "eps"), update_adamw)
SGD = Rule("sparse_sgd", ("momenta",), ("momentum",), update_sgd)
RULES = (ADAMW, SGD)

backends.register(
    "sparse_optimizer", ("reference", "cpp", "triton", "cuda"), {rule.name: rule.reference for rule in RULES}
)
for rule in RULES:
    backends.define(rule.schema, rule.run)


# What a caller sees.


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

    In place; the rest of the weight keeps its bits. What is not named here is described at `Arguments`.

    Args:
        exp_avgs: first moments, float32, shaped as the selected part.
        exp_avg_sqs: second moments, float32, shaped as the selected part.
        betas: decay of the two moments.
        eps: added to the denominator.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: lengths, shapes or dtypes do not fit, or 16-bit weights have neither values nor seed.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    numbers = lr, weight_decay, step, seed, grad_scale, found_inf
    ADAMW.step(Arguments(values, grads, moments, weights, indices, dims, *numbers), (*betas, eps), backend)


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
    2013). In place; the rest of the weight keeps its bits. What is not named here is described at `Arguments`.

    Args:
        momenta: float32, shaped as the selected part, zero at first; None without momentum.
        momentum: how much of the last direction is kept.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Raises:
        ValueError: lengths, shapes or dtypes do not fit, or 16-bit weights have neither values nor seed.
        UnknownNameError, BackendError: the backend is unknown, or cannot run here.
    """
    if not weights:
        return
    if (momenta is None) != (momentum == 0.0):
        raise ValueError("momenta go with a momentum above 0; give both or neither")
    numbers = lr, weight_decay, step, seed, grad_scale, found_inf
    given = Arguments(values, grads, {} if momenta is None else {"momenta": momenta}, weights, indices, dims, *numbers)
    SGD.step(given, (momentum,), backend)
