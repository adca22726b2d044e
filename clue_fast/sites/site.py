"""What a site is: a family of units, where it lives, and which slices of the parameters belong to its units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from clue_fast.deprecated import RenamedAttribute, renamed_arguments

_IN_FILES = {"slices": "parts", "expert_index": "lead"}
"""What files have other names for."""

HEAD_FAMILIES = ("attention", "projection")
"""How the kinds of heads, and of their slices in single projections, begin."""


@renamed_arguments(lead="expert_index")
@dataclass(frozen=True)
class ParamSlice:
    """Where the units of a site lie in one parameter: unit u has ``size`` slices from ``offset + u * stride`` on.

    Attributes:
        parameter: path of the parameter in the model, such as ``model.layers.3.mlp.gate_proj.weight``.
        dim: the dimension along which the units lie, of the parameter or, where it is stacked, of
            ``parameter[expert_index]``.
        offset: where the first unit begins along it.
        stride: from one unit to the next.
        size: slices of a unit.
        expert_index: index into the first dimension of a parameter that stacks those of several experts, or None.
        block, gap: after every ``block`` units, ``gap`` slices are left out.
    """

    parameter: str
    dim: int
    offset: int = 0
    stride: int = 1
    size: int = 1
    expert_index: int | None = None
    block: int | None = None
    gap: int = 0
    lead = RenamedAttribute("expert_index")

    def index(self, units: Tensor) -> Tensor:
        """Returns the slices that belong to units, int64 [len(units) * size], in the order of the units."""
        units = units.to(torch.int64)
        first = self.offset + units * self.stride
        if self.block is not None:
            first = first + units // self.block * self.gap
        return (first[:, None] + torch.arange(self.size, device=units.device)).flatten()

    def of(self, parameter: Tensor) -> Tensor:
        """Returns what ``dim`` counts in: the parameter, or the matrix of it that belongs to this site, as a view."""
        return parameter if self.expert_index is None else parameter[self.expert_index]


@renamed_arguments(parts="slices")
@dataclass(frozen=True)
class Site:
    """One family of units, and where it lives.

    Attributes:
        path: path of the module in the model, such as ``model.layers.3.mlp``.
        kind: family of the units: ``mlp`` (channels of a dense MLP), ``expert`` (channels of one expert),
            ``attention_head`` (with as many key/value heads as query heads), or ``attention_query`` and
            ``attention_key_value`` (with grouped queries); or the slices of a head in one projection each:
            ``projection_query``, ``projection_key``, ``projection_value`` (of key/value heads) and
            ``projection_output``.
        width: number of units.
        layer: index of the transformer layer in its tower, from 0.
        structure: how the module computes: ``gated`` (down(act(gate) · up)), ``packed`` (the same, gate and up in
            one projection), ``plain`` (down(act(up))), ``experts`` (stacked ``packed``), ``heads``, or ``rows`` (the
            activations are what the rows of a projection give).
        output: path of the projection that reads the units' activations; with ``rows``, of the one that gives them;
            for experts, of the parameter.
        slices: what the units own of the parameters: all of it is trained together.
        inputs: paths of the projections that a unit has rows of; gate before up.
        activation: name of the activation in between, a key of ``ACTIVATIONS``, or None if it is another one.
        multipliers: what the gate, and what the module returns, is multiplied by (maximal update parametrization).
        channels: channels of the input of ``output`` (with ``rows``, of what it gives) that make up one unit: 1, or
            those of a head.
        index: which of the stacked experts.
        reads_encoder: whether its tokens are those of the encoder, as of keys and values of cross-attention.
    """

    path: str
    kind: str
    width: int
    layer: int
    structure: str = "plain"
    output: str = ""
    slices: tuple[ParamSlice, ...] = ()
    inputs: tuple[str, ...] = ()
    activation: str | None = None
    channels: int = 1
    index: int | None = None
    reads_encoder: bool = False
    multipliers: tuple[float, float] = (1.0, 1.0)
    parts = RenamedAttribute("slices")

    @property
    def name(self) -> str:
        """What tells this site from all others: its path, and what else lives there."""
        if self.index is not None:
            return f"{self.path}[{self.index}]"
        return f"{self.path}:{self.kind}" if self.kind.startswith(HEAD_FAMILIES) else self.path

    def given_channels(self) -> Tensor:
        """Returns where the activations are in what ``output`` gives, with the structure ``rows``.

        int64 [width * channels], unit by unit.
        """
        units = torch.arange(self.width, device="cpu")
        weight = [owned for owned in self.slices if owned.parameter == self.slices[0].parameter]
        return torch.cat([owned.index(units).reshape(self.width, -1) for owned in weight], dim=1).flatten()

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, as JSON holds them."""
        fields = {_IN_FILES.get(name, name): value for name, value in asdict(self).items()}
        owned = [{_IN_FILES.get(name, name): value for name, value in one.items()} for one in fields["parts"]]
        return {**fields, "parts": owned}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Site:
        """Returns the site that ``as_dict`` described. Raises TypeError or KeyError if the fields are not those."""
        now = {name: key for key, name in _IN_FILES.items()}
        owned = tuple(ParamSlice(**{now.get(name, name): one[name] for name in one}) for one in fields["parts"])
        known = {now.get(name, name): value for name, value in fields.items()}
        known |= {"slices": owned, "inputs": tuple(fields["inputs"])}
        return cls(**known | {"multipliers": tuple(fields.get("multipliers", cls.multipliers))})


def layer_index(path: str) -> int:
    """Returns the first number in a path, or 0."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[0]) if numbers else 0
