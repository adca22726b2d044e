"""Which sparse class a layer gets, and whether the layer computes what that class takes for granted."""

from __future__ import annotations

import torch
from torch import nn

from clue_fast.sites.experts import find_stack
from clue_fast.sites.projection import projection_of
from clue_fast.training.experts import SparseExperts
from clue_fast.training.modules import SparseLinear, SparseModule, SparseProjection


def sparse_class(module: nn.Module) -> type[SparseModule] | None:
    """Returns the sparse class of a layer, a subclass of the layer's own, or None if there is none."""
    if type(module) is nn.Linear:
        return SparseLinear
    if projection_of(module, "") is not None:
        return _mixed(SparseProjection, type(module))
    if find_stack(module) is not None and callable(getattr(module, "_apply_gate", None)):
        return _mixed(SparseExperts, type(module))
    return None


def original_class(module: SparseModule) -> type[nn.Module]:
    """Returns the class that a sparse module had before."""
    order = type(module).__mro__
    found: type[nn.Module] = order[order.index(SparseModule) + 1]
    return found


def _mixed(mixin: type[SparseModule], original: type[nn.Module]) -> type[SparseModule]:
    if (mixin, original) not in _classes:
        name = f"Sparse{original.__name__}"
        _classes[mixin, original] = type(
            name, (mixin, original), {"__doc__": f"{original.__name__}, some of which trains."}
        )
    return _classes[mixin, original]


_classes: dict[tuple[type[SparseModule], type[nn.Module]], type[SparseModule]] = {}


def output_dim(module: nn.Module) -> int:
    """Returns the dimension of a layer's weight that counts its outputs, behind that of the experts if it has them."""
    projection, stack = projection_of(module, ""), find_stack(module)
    if projection is not None:
        return projection.output_dim
    return int(stack is not None and stack.transposed)


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether a projection multiplies its input by its weight and adds its bias, found by running it.

    Compared on at most 64 of its outputs, so that no copy of a large weight is made.
    """
    projection = projection_of(module, "")
    assert projection is not None
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    x = torch.randn(3, projection.inputs, generator=torch.Generator().manual_seed(0), device="cpu").to(weight)
    chosen = torch.arange(0, projection.outputs, -(-projection.outputs // 64), device=weight.device)
    matrix = weight.index_select(projection.output_dim, chosen).double()
    expected = x.double() @ (matrix.t() if projection.output_dim == 0 else matrix)
    expected += 0.0 if bias is None else bias[chosen].double()
    found = type(module).forward(module, x)
    if found.shape != (len(x), projection.outputs):
        return False
    # A product of n terms in 16 bits is off by a few units in the last place of its norm; another function is not.
    return bool((found[:, chosen].double() - expected).norm() < 0.05 * expected.norm())
