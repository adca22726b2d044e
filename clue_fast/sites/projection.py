"""Projections: modules that multiply by a matrix, whichever way it is stored and whatever is wrapped around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.sites.site import ParamSlice


@dataclass(frozen=True)
class Projection:
    """A linear module, seen by its shape.

    Attributes:
        path: of the module in the model.
        weight: path of its weight, below an adapter if there is one.
        inputs, outputs: its numbers of channels.
        output_dim: the dimension of the weight that counts the outputs: 0 as in ``nn.Linear``, 1 where the weight is
            stored [inputs, outputs] as in GPT-2.
        bias: path of its bias, or None.
    """

    path: str
    weight: str
    inputs: int
    outputs: int
    output_dim: int
    bias: str | None

    def rows(self, *place: int, **where: Any) -> tuple[ParamSlice, ...]:
        """What a unit owns that this projection computes: rows of the weight, and their bias.

        Args:
            place, where: offset, stride, size and so on, as in ``ParamSlice``.
        """
        weight = ParamSlice(self.weight, self.output_dim, *place, **where)
        return (weight,) if self.bias is None else (weight, ParamSlice(self.bias, 0, *place, **where))

    def columns(self, size: int = 1) -> ParamSlice:
        """What a unit owns that this projection reads: columns of the weight."""
        return ParamSlice(self.weight, 1 - self.output_dim, 0, size, size)


def projection_of(module: nn.Module | None, path: str) -> Projection | None:
    """Returns a module as a projection, or None if it is none.

    A linear module, quantized ones among them, has ``in_features``, ``out_features`` and a weight; one that stores
    its weight transposed has ``nf``; an adapter wraps one of them as its ``base_layer``.
    """
    weight_path = path
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module, weight_path = base, f"{weight_path}.base_layer"
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    inputs, outputs, output_dim = getattr(module, "in_features", None), getattr(module, "out_features", None), 0
    if isinstance(nf := getattr(module, "nf", None), int) and weight.dim() == 2 and weight.shape[1] == nf:
        inputs, outputs, output_dim = weight.shape[0], nf, 1
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    bias = f"{weight_path}.bias" if isinstance(getattr(module, "bias", None), Tensor) else None
    return Projection(path, f"{weight_path}.weight", inputs, outputs, output_dim, bias)


def child_projections(module: nn.Module, path: str) -> dict[str, Projection]:
    """Returns the direct children of a module that are projections, by their name in it."""
    prefix = f"{path}." if path else ""
    found = {name: projection_of(child, f"{prefix}{name}") for name, child in module.named_children()}
    return {name: projection for name, projection in found.items() if projection is not None}


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input by a weight and adds a bias, found by running it.

    Compared on at most 64 of its outputs, so that no copy of a large weight is made.
    """
    if type(module).forward is nn.Linear.forward:
        return True
    projection = projection_of(module, "")
    if projection is None:
        return False
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


def weight_matrix(module: nn.Module) -> Tensor:
    """Returns the weight of a projection as [outputs, inputs], whichever way it is stored."""
    projection = projection_of(module, "")
    assert projection is not None
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if projection.output_dim == 0 else weight.T


def output_bias(module: nn.Module) -> Tensor | None:
    """Returns the bias of a projection, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None
