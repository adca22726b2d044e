"""A linear layer in which only some rows or columns of the weight have a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clue_fast.deprecated import renamed_arguments
from clue_fast.ops import backend as backends
from clue_fast.ops.backend import define

ROWS, COLUMNS = 0, 1
RUN = 1024  # tokens widened to float32 at a time: as fast as all at once, in bounded memory


# The definition: launch functions in plain PyTorch. Its bfloat16 product takes 6.5 ms on CPU (205 rows,
# 2048 tokens, 1024 features, 2 threads); PyTorch's own takes 3.7 ms, but rounds the gradient to bfloat16.


def reference_gather(x: Tensor, index: Tensor, out: Tensor) -> None:
    """Out = x[:, index]."""
    torch.index_select(x, 1, index, out=out)


def reference_backward(grad: Tensor, x: Tensor, index: Tensor | None, out: Tensor) -> None:
    """Out = grad[:, index]^T x, accumulated in the dtype of out; all columns of grad without an index."""
    if index is not None:
        grad = grad.index_select(1, index)
    if grad.is_cuda and torch.version.hip is None and out.dtype != grad.dtype:
        # cuBLAS multiplies 16 bits into float32 without widening them first.
        torch.ops.aten.mm.dtype_out(grad.t(), x, out.dtype, out=out)
        return
    out.zero_()
    for grad_run, x_run in zip(torch.split(grad, RUN), torch.split(x, RUN), strict=True):
        out.addmm_(grad_run.to(out.dtype).t(), x_run.to(out.dtype))


def _preference(device: str) -> tuple[str, ...] | None:
    """The definition before Triton on NVIDIA, where a library multiplies 16 bits into float32: cuBLAS.

    Neither is measured against the other. Both gather 5 % of the gradient and none makes the dense one, so what differs
    is the product, and that of a library is tuned to more GPUs. `backend="triton"` takes the other. ROCm and XPU have
    no such product: there the definition widens its operands in memory first, and Triton does not.
    """
    return ("reference", "triton") if device == "cuda" and torch.version.hip is None else None


backends.register(
    "sparse_linear",
    ("reference", "cpp", "triton"),
    {"sparse_linear_gather": reference_gather, "sparse_linear_backward": reference_backward},
    _preference,
)


# Forward and backward, on whichever backend. A selection of output features keeps all of x for the backward, one of
# input features only those, [tokens, k].


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return F.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], weight.shape[1])


def _selects_outputs(dim: int, transposed: bool) -> bool:
    return (dim == ROWS) != transposed


def _gather(x: Tensor, index: Tensor, backend: str | None = None) -> Tensor:
    flat = _rows(x)
    out = x.new_empty(flat.shape[0], index.shape[0])
    _launch("sparse_linear_gather", x, backend)(flat, index, out)
    return out


def _selected_grad(
    grad: Tensor, kept: Tensor, index: Tensor, dim: int, transposed: bool = False, backend: str | None = None
) -> Tensor:
    shape = _selected_shape(grad, kept, index, dim, transposed)
    out = torch.empty(shape, dtype=_selected_dtype(grad), device=grad.device)
    launch = _launch("sparse_linear_backward", grad, backend)
    outputs = index if _selects_outputs(dim, transposed) else None
    launch(_rows(grad), _rows(kept), outputs, out.t() if transposed else out)
    return out


def _launch(name: str, x: Tensor, backend: str | None) -> backends.Launch:
    return backends.launch_for("sparse_linear", name, x, backend)


def _selected_shape(grad: Tensor, kept: Tensor, index: Tensor, dim: int, transposed: bool) -> tuple[int, int]:
    outputs = _selects_outputs(dim, transposed)
    shape = (index.shape[0], kept.shape[-1]) if outputs else (grad.shape[-1], index.shape[0])
    return shape[::-1] if transposed else shape


def _selected_dtype(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty(x.shape[:-1].numel(), 0)
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _save(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    dim: int,
    transposed: bool,
    backend: str | None,
    gather: Callable[..., Tensor],
) -> None:
    needs_x, _, _, needs_values = ctx.needs_input_grad[:4]
    kept = None
    if needs_values:
        kept = x if _selects_outputs(dim, transposed) else gather(x, index, backend)
    ctx.save_for_backward(weight if needs_x else None, kept, index)
    ctx.dim, ctx.transposed, ctx.backend = dim, transposed, backend


def _gradients(
    ctx: Any, grad: Tensor, gather: Callable[..., Tensor], selected_grad: Callable[..., Tensor]
) -> tuple[Tensor | None, ...]:
    """Of x, weight, bias, values and bias_values."""
    weight, kept, index = ctx.saved_tensors
    needs_x, _, needs_bias, needs_values, needs_bias_values = ctx.needs_input_grad[:5]
    grad_x = grad_bias = grad_values = grad_bias_values = None
    if needs_x:
        grad_x = grad @ (weight.t() if ctx.transposed else weight)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    if needs_values:
        grad_values = selected_grad(grad, kept, index, ctx.dim, ctx.transposed, ctx.backend)
    if needs_bias_values:
        grad_bias_values = gather(grad, index, ctx.backend).sum(0, dtype=_selected_dtype(grad))
    return grad_x, None, grad_bias, grad_values, grad_bias_values


# Schema, fake and autograd, for torch.compile.


def _op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    bias_values: Tensor | None,
    index: Tensor,
    dim: int,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    return _forward(x, weight, bias, transposed)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    bias_values: Tensor | None,
    index: Tensor,
    dim: int,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1 if transposed else 0]))


def _fake_gather(x: Tensor, index: Tensor, backend: str | None = None) -> Tensor:
    return x.new_empty(x.shape[:-1].numel(), index.shape[0])


def _fake_selected_grad(
    grad: Tensor, kept: Tensor, index: Tensor, dim: int, transposed: bool = False, backend: str | None = None
) -> Tensor:
    return grad.new_empty(_selected_shape(grad, kept, index, dim, transposed), dtype=_selected_dtype(grad))


define(
    "sparse_linear(Tensor x, Tensor weight, Tensor? bias, Tensor values, Tensor? bias_values, Tensor index, "
    "int dim, bool transposed=False, str? backend=None) -> Tensor",
    _op,
    _fake,
)


define("sparse_linear_gather(Tensor x, Tensor index, str? backend=None) -> Tensor", _gather, _fake_gather)


define(
    "sparse_linear_backward(Tensor grad, Tensor kept, Tensor index, int dim, bool transposed=False, "
    "str? backend=None) -> Tensor",
    _selected_grad,
    _fake_selected_grad,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, _, _, index, dim, transposed, backend = inputs
    _save(ctx, x, weight, index, dim, transposed, backend, torch.ops.clue_fast.sparse_linear_gather)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    operators = torch.ops.clue_fast
    gradients = _gradients(ctx, grad, operators.sparse_linear_gather, operators.sparse_linear_backward)
    return *gradients, None, None, None, None


torch.library.register_autograd("clue_fast::sparse_linear", _differentiate, setup_context=_setup)


# Eager: straight to the product and to the launch functions.


class _Direct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        values: Tensor,
        bias_values: Tensor | None,
        index: Tensor,
        dim: int,
        transposed: bool,
        backend: str | None,
    ) -> Tensor:
        _save(ctx, x, weight, index, dim, transposed, backend, _gather)
        return _forward(x, weight, bias, transposed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, grad, _gather, _selected_grad), None, None, None, None


@renamed_arguments(selected="values", selected_bias="bias_values")
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    dim: int,
    *,
    bias_values: Tensor | None = None,
    transposed: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Exactly `F.linear(x, weight, bias)`, with a gradient for selected rows or columns of the weight only.

    Backward gathers the selected features of the output gradient or of x and runs one thin matrix product,
    accumulated in float32; neighbors in the index, such as those of an attention head, are copied as one. The
    weight itself gets no gradient. Under autocast, x, weight and bias are cast as `F.linear` casts them.

    Of stacked weights, such as those of experts, give one: `weight[expert]`. A packed gate and up projection is
    one weight with twice the rows.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.
        values: the leaf that gets the gradient, float32 (float64 for float64 weights), shaped as
            weight.index_select(dim, index). Never read, so it may be a single number, expanded.
        index: int64 [k], sorted, unique, in range (not checked here).
        dim: 0 for rows, 1 for columns, of the weight as it is stored.
        bias_values: the leaf that gets the gradient of bias[index], [k], in the dtype of values; only if
            the index counts output features. Never read.
        transposed: the weight is stored as [in_features, out_features], as that of a Conv1D, and multiplied as
            Conv1D does. Its rows are then input features.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Returns:
        [..., out_features].

    Raises:
        ValueError: shapes or dtypes do not fit.
        UnknownNameError, BackendError: in backward, if the backend is unknown or cannot run here.
    """
    _check(weight, values, bias_values, index, dim, transposed)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        # Here rather than inside: an operator's body runs outside autocast once it is compiled.
        dtype = torch.get_autocast_dtype(kind)
        x, weight = _cast(x, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    arguments = (x, weight, bias, values, bias_values, index, dim, transposed, backend)
    out: Tensor = backends.run("sparse_linear", _eager, *arguments)
    return out


def _eager(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> Tensor:
    if torch.is_grad_enabled():
        out: Tensor = _Direct.apply(x, weight, bias, *others)  # type: ignore[no-untyped-call]
        return out
    transposed: bool = others[4]
    return _forward(x, weight, bias, transposed)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(dtype)


def _check(
    weight: Tensor, values: Tensor, bias_values: Tensor | None, index: Tensor, dim: int, transposed: bool
) -> None:
    if dim not in (ROWS, COLUMNS):
        raise ValueError(f"dim must be 0 for rows or 1 for columns, not {dim}")
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"index must be int64 [k], not {index.dtype} {list(index.shape)}")
    shape = list(weight.shape)
    shape[dim] = index.shape[0]
    if list(values.shape) != shape:
        raise ValueError(f"values must be {shape}, not {list(values.shape)}")
    if values.dtype != torch.float32 and weight.dtype != torch.float64:
        raise ValueError(f"values must be float32, not {values.dtype}")
    if bias_values is None:
        return
    if not _selects_outputs(dim, transposed):
        raise ValueError("bias_values go with selected output features, but the index counts input features")
    if bias_values.shape != index.shape or bias_values.dtype != values.dtype:
        raise ValueError(
            f"bias_values must be {list(index.shape)} {values.dtype}, not {list(bias_values.shape)} {bias_values.dtype}"
        )
