"""h = act(gate) * up, and on the way the statistics of h by token group.

SwiGLU and its relatives: Shazeer 2020 (arXiv 2002.05202); ReLU squared: So et al. 2021 (arXiv 2109.08668).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.errors import UnknownNameError
from clue_fast.internals import below_autograd, has_no_data
from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import GRADIENT_SUMS, SUMS, check_group, check_statistics, check_sums, rows, wide
from clue_fast.ops.backend import define, define_autograd
from clue_fast.ops.channel_statistics import reference_attribution, reference_statistics
from clue_fast.ops.conflict_score import CLOSED_FORMS, SCORING, Scoring, checked, packed

SQRT_HALF = 0.5**0.5
SQRT_2_OVER_PI = 0.7978845608028654
GELU_CUBIC = 0.044715


# The definition: launch functions in plain PyTorch. They compute in float32, or float64, and round once.


def _silu(x: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    cumulative = 0.5 * (1 + torch.erf(x * SQRT_HALF))
    return x * cumulative, cumulative + x * torch.exp(-0.5 * x * x) * (0.5 * SQRT_2_OVER_PI)


def _gelu_tanh(x: Tensor) -> tuple[Tensor, Tensor]:
    tanh = torch.tanh(SQRT_2_OVER_PI * (x + GELU_CUBIC * x * x * x))
    inner_slope = SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner_slope


def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.relu(x), (x > 0).to(x.dtype)


def _relu2(x: Tensor) -> tuple[Tensor, Tensor]:
    positive = torch.relu(x)
    return positive * positive, 2 * positive


VALUE_AND_SLOPE: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": _relu,
    "relu2": _relu2,
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
"""By name, of gate; sites are told by the same table."""


def reference(gate: Tensor, up: Tensor, out: Tensor, activation: str) -> None:
    """Out = act(gate) * up."""
    out.copy_(ACTIVATIONS[activation](wide(gate)) * wide(up))


def reference_record(
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    activation: str,
    group: Tensor,
    statistics: Tensor,
    sums: str = "all",
    *scoring: Any,
) -> None:
    """The same, and adds out to the statistics."""
    reference(gate, up, out, activation)
    reference_statistics(out, group, statistics, *scoring, sums=sums)


def reference_backward(
    grad: Tensor, gate: Tensor, up: Tensor, grad_gate: Tensor, grad_up: Tensor, activation: str
) -> None:
    """grad_gate = grad * up * act'(gate) and grad_up = grad * act(gate)."""
    value, slope = VALUE_AND_SLOPE[activation](wide(gate))
    grad_gate.copy_(wide(grad) * wide(up) * slope)
    grad_up.copy_(wide(grad) * value)


def reference_backward_record(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    grad_gate: Tensor,
    grad_up: Tensor,
    activation: str,
    group: Tensor,
    gradient_statistics: Tensor,
    sums: str = "all",
    *scoring: Any,
) -> None:
    """The same, and adds h * grad to the gradient statistics."""
    reference_backward(grad, gate, up, grad_gate, grad_up, activation)
    h = torch.empty_like(grad)
    reference(gate, up, h, activation)
    reference_attribution(h, grad, group, gradient_statistics, *scoring, sums=sums)


backends.register(
    "gated_activation",
    ("reference", "cpp", "triton"),
    {
        "gated_activation": reference,
        "gated_activation_record": reference_record,
        "gated_activation_backward": reference_backward,
        "gated_activation_backward_record": reference_backward_record,
    },
)


# Forward and backward, on whichever backend.


def _launch(name: str, like: Tensor, backend: str | None) -> backends.Launch:
    return backends.launch_for("gated_activation", name, like, backend)


def _forward(
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor | None,
    statistics: Tensor | None,
    gradient_statistics: Tensor | None = None,
    backend: str | None = None,
    sums: str = "all",
    gradient_sums: str = "all",
    *scoring: Any,
) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if statistics is None or group is None:
        _launch("gated_activation", gate, backend)(rows(gate), rows(up), rows(out), activation)
    else:
        launch = _launch("gated_activation_record", gate, backend)
        launch(rows(gate), rows(up), rows(out), activation, group.reshape(-1), statistics, sums, *scoring)
    return out


def _backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor | None,
    gradient_statistics: Tensor | None,
    backend: str | None = None,
    sums: str = "all",
    *scoring: Any,
) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    tensors = rows(grad), rows(gate), rows(up), rows(grad_gate), rows(grad_up)
    if gradient_statistics is None or group is None:
        _launch("gated_activation_backward", gate, backend)(*tensors, activation)
    else:
        launch = _launch("gated_activation_backward_record", gate, backend)
        launch(*tensors, activation, group.reshape(-1), gradient_statistics, sums, *scoring)
    return grad_gate, grad_up


# Schema, fake and autograd. torch.compile and tensors without data go through the operators; eager goes straight to
# the launch function, since the dispatcher costs more than a small kernel.


def _op(
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor | None = None,
    gradient_statistics: Tensor | None = None,
    backend: str | None = None,
    gradient_sums: str = "all",
) -> Tensor:
    return _forward(gate, up, activation, group, None, gradient_statistics, backend)


def _op_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    return _backward(grad, gate, up, activation, None, None, backend)


def _fake(gate: Tensor, *_: Any) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(grad: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


define(
    "gated_activation(Tensor gate, Tensor up, str activation, Tensor? group=None, "
    'Tensor? gradient_statistics=None, str? backend=None, str gradient_sums="all") -> Tensor',
    _op,
    _fake,
)


define(
    "gated_activation_record(Tensor gate, Tensor up, str activation, Tensor group, Tensor(a!) statistics, "
    'Tensor? gradient_statistics=None, str? backend=None, str sums="all", str gradient_sums="all", '
    f"{SCORING}) -> Tensor",
    _forward,
    _fake,
)


define(
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str activation, str? backend=None) "
    "-> (Tensor, Tensor)",
    _op_backward,
    _fake_backward,
)


define(
    "gated_activation_backward_record(Tensor grad, Tensor gate, Tensor up, str activation, Tensor group, "
    'Tensor(a!) gradient_statistics, str? backend=None, str sums="all") -> (Tensor, Tensor)',
    _backward,
    _fake_backward,
)


def _dispatch(
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor | None,
    statistics: Tensor | None,
    gradient_statistics: Tensor | None,
    backend: str | None,
    sums: str,
    gradient_sums: str,
    *scoring: Any,
) -> Tensor:
    out: Tensor
    if statistics is None:
        out = torch.ops.clue_fast.gated_activation(
            gate, up, activation, group, gradient_statistics, backend, gradient_sums
        )
    else:
        out = torch.ops.clue_fast.gated_activation_record(
            gate, up, activation, group, statistics, gradient_statistics, backend, sums, gradient_sums, *scoring
        )
    return out


def _dispatch_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor | None,
    gradient_statistics: Tensor | None,
    backend: str | None,
    sums: str,
) -> tuple[Tensor, Tensor]:
    grads: tuple[Tensor, Tensor]
    if gradient_statistics is None:
        grads = torch.ops.clue_fast.gated_activation_backward(grad, gate, up, activation, backend)
    else:
        grads = torch.ops.clue_fast.gated_activation_backward_record(
            grad, gate, up, activation, group, gradient_statistics, backend, sums
        )
    return grads


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        activation: str,
        group: Tensor | None,
        statistics: Tensor | None,
        gradient_statistics: Tensor | None,
        backend: str | None,
        sums: str,
        gradient_sums: str,
        scoring: Scoring | None,
        traced: bool,
    ) -> Tensor:
        # What is saved must not depend on `statistics`: a recomputation saves the same, and goes without them.
        # The accumulators stay aside, since other steps may add to them before this backward runs.
        ctx.save_for_backward(gate, up, None if gradient_statistics is None else group)
        ctx.gradient_statistics = gradient_statistics
        ctx.scoring = None if scoring is None or gradient_statistics is None else scoring.in_backward()
        ctx.activation, ctx.backend, ctx.sums, ctx.traced = activation, backend, gradient_sums, traced
        recording = group, statistics, gradient_statistics, backend, sums, gradient_sums, *(scoring or ())
        arguments = gate, up, activation, *recording
        if not traced:
            return _forward(*arguments)
        with below_autograd():
            return _dispatch(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, group = ctx.saved_tensors
        arguments = grad, gate, up, ctx.activation, group, ctx.gradient_statistics, ctx.backend, ctx.sums
        grads = _dispatch_backward(*arguments) if ctx.traced else _backward(*arguments, *(ctx.scoring or ()))
        return *grads, *[None] * 9


def _apply(traced: bool, *arguments: Any) -> Tensor:
    out: Tensor = _GatedActivation.apply(*arguments, traced)  # type: ignore[no-untyped-call]
    return out


def _op_autograd(
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor | None = None,
    gradient_statistics: Tensor | None = None,
    backend: str | None = None,
    gradient_sums: str = "all",
) -> Tensor:
    return _apply(True, gate, up, activation, group, None, gradient_statistics, backend, "all", gradient_sums, None)


def _op_record_autograd(
    gate: Tensor,
    up: Tensor,
    activation: str,
    group: Tensor,
    statistics: Tensor,
    gradient_statistics: Tensor | None = None,
    backend: str | None = None,
    sums: str = "all",
    gradient_sums: str = "all",
    *scoring: Any,
) -> Tensor:
    recording = group, statistics, gradient_statistics, backend, sums, gradient_sums, packed(scoring)
    return _apply(True, gate, up, activation, *recording)


define_autograd("gated_activation", _op_autograd)


define_autograd("gated_activation_record", _op_record_autograd)


def gated_activation(
    gate: Tensor,
    up: Tensor,
    activation: str = "silu",
    *,
    group: Tensor | None = None,
    statistics: Tensor | None = None,
    gradient_statistics: Tensor | None = None,
    sums: str = "all",
    gradient_sums: str = "all",
    scoring: Scoring | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gated activation, with statistics by token group on request.

    Computed in float32 and rounded once; what is recorded is h as rounded, which is what `down_proj` sees.
    Backward saves gate and up only and recomputes h. Under gradient checkpointing the forward runs twice:
    pass `statistics=None` the second time, and `gradient_statistics` both times, since backward runs once.

    Args:
        gate: [..., channels], float32, bfloat16 or float16 (float64 on the reference backend). Halves of one
            packed tensor are taken as they are; a last dimension that is not contiguous is copied.
        up: in shape and dtype of gate.
        activation: one of ACTIVATIONS, applied to gate.
        group: int8, one for each token; g counts into row g - 1; 0, and g beyond the rows, are not counted.
        statistics: float64 [groups, len(FIELDS), channels]; forward adds h.
        gradient_statistics: float64 [groups, len(GRADIENT_FIELDS), channels]; backward adds h * dL/dh.
        sums: which of them, one of SUMS; the other fields stay as they are.
        gradient_sums: the same of gradient_statistics, one of GRADIENT_SUMS.
        scoring: forward also writes the scores of the channels, as `conflict_score` gives them afterwards, in the same
            launch; and so does backward for a criterion that reads gradient statistics, which are then its source.
            Without tokens nothing is written.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Returns:
        h, in shape and dtype of gate.

    Raises:
        ValueError: shapes or dtypes do not fit.
        UnknownNameError: no such activation, sums, criterion or backend.
        BackendError: the backend cannot run here.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate and up differ: {list(gate.shape)} {gate.dtype} against {list(up.shape)} {up.dtype}")
    if activation not in ACTIVATIONS:
        raise UnknownNameError("activation", activation, ACTIVATIONS)
    if statistics is not None or gradient_statistics is not None:
        check_group(group, gate)
        check_statistics(gate, statistics, gradient_statistics)
        check_sums(sums, gradient_sums)
    added_to = statistics
    if statistics is None and scoring is not None:  # recomputed: only backward adds
        added_to, scoring = gradient_statistics, scoring.in_backward()
    fields = () if added_to is None else checked(scoring, added_to)
    if fields and not {*SUMS[sums], *GRADIENT_SUMS[gradient_sums]}.issuperset(CLOSED_FORMS[fields[0]].fields):
        raise ValueError(f"criterion {fields[0]!r} reads more than the sums {sums!r} and {gradient_sums!r}")
    arguments = gate, up, activation, group, statistics, gradient_statistics, backend, sums, gradient_sums
    if torch.compiler.is_compiling() or has_no_data(gate):
        return _dispatch(*arguments, *fields)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _apply(False, *arguments, packed(fields))
    return _forward(*arguments, *fields)
