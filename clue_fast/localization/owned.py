"""What a unit owns of the linear modules of a model, so that gradients of its weights can be reduced to one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.errors import SiteError
from clue_fast.sites import Part, Site
from clue_fast.statistics import Statistics

ROWS, COLUMNS, BIAS = "rows", "columns", "bias"


@dataclass(frozen=True, eq=False)
class Owned:
    """One part of the units of a site, bound to the linear module y = Wz + b that holds it.

    Attributes:
        site: index of the site in the statistics.
        number: which of the parts of the site.
        units: range of its units in the statistics.
        module: path of the module.
        side: "rows" of W, the outputs y_u of the unit; "columns" of W, its inputs z_u; or its "bias".
        index: the outputs or inputs, int64 [width * size], or None for all of them in order.
        width: number of units.
    """

    site: int
    number: int
    units: slice
    module: str
    side: str
    index: Tensor | None
    width: int

    def take(self, x: Tensor) -> Tensor:
        """Returns what belongs to the units of x [..., features], [..., width * size]."""
        return x if self.index is None else x[..., self.index.to(x.device)]

    def per_unit(self, x: Tensor) -> Tensor:
        """Sums x [..., width * size] over the slices of each unit, [..., width]."""
        return x.reshape(*x.shape[:-1], self.width, -1).sum(-1)


def owned_parts(model: nn.Module, statistics: Statistics) -> list[Owned]:
    """Returns the parts of all sites, bound to their modules.

    Raises:
        SiteError: a part lies in no linear module, such as packed experts.
    """
    return [
        _bind(model, part, number, index, statistics.units(site), site)
        for index, site in enumerate(statistics.sites)
        for number, part in enumerate(site.parts)
    ]


def column_parts(owned: Sequence[Owned]) -> list[Owned]:
    """Returns the parts that read the activations of the units: columns of the module behind them."""
    return [part for part in owned if part.side == COLUMNS]


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes Wz + b: nn.Linear, or the Conv1D of GPT-2, whose weight is [in, out]."""
    return isinstance(module, nn.Linear) or _is_transposed(module)


def output_bias(module: nn.Module) -> Tensor | None:
    """Returns the bias of a linear module, or None."""
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def matrix(module: nn.Module) -> Tensor:
    """Returns the weight of a linear module as [outputs, inputs]."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if _is_transposed(module) else weight


def _is_transposed(module: nn.Module) -> bool:
    return hasattr(module, "nf") and isinstance(getattr(module, "weight", None), Tensor)


def _bind(model: nn.Module, part: Part, number: int, site_index: int, units: slice, site: Site) -> Owned:
    path, _, kind = part.parameter.rpartition(".")
    module = model.get_submodule(path)
    if not is_linear(module) or kind not in ("weight", "bias") or part.lead is not None:
        raise SiteError(
            f"{part.parameter} of {site.name} belongs to no linear module; gradients of its weights cannot be reduced "
            "to units; choose a criterion that needs activations only, or attribution"
        )
    outputs, inputs = matrix(module).shape
    if kind == "bias":
        side, features = BIAS, outputs
    else:
        rows = (part.dim == 0) != _is_transposed(module)
        side, features = (ROWS, outputs) if rows else (COLUMNS, inputs)
    index = part.index(torch.arange(site.width, device="cpu"))
    everything = len(index) == features and bool((index == torch.arange(features, device="cpu")).all())
    return Owned(site_index, number, units, path, side, None if everything else index, site.width)
