"""Wrappers around a model that change nothing of what it is.

What a site is: a family of units, where it lives, and what its units own of the parameters.

The fingerprint of a model: what statistics and selections are tied to.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.deprecated import RenamedAttribute, renamed_arguments

_WRAPPED = {"_orig_mod", "module"}  # torch.compile; DistributedDataParallel and DataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside of torch.compile and DistributedDataParallel: paths and names are always of that."""
    while len(children := dict(model.named_children())) == 1 and children.keys() <= _WRAPPED:
        (model,) = children.values()
    return model


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


def model_fingerprint(model: nn.Module) -> str:
    """Returns a short hash of what a model is: names and shapes of its weights, and a sample of its embedding.

    Unlearning trains neither, so a model keeps its fingerprint through it, while another architecture, or the same
    one with other weights, has another. The sample is rounded to bfloat16, so that loading in another precision
    does not matter.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(_saved_tensors(model).items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
    embedding = _input_embedding(model)
    if embedding is not None and embedding.device.type != "meta":
        whole: Tensor = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding  # sharded, or not
        sample = whole.detach().reshape(-1)
        stride = max(1, sample.numel() // 4096)
        digest.update(sample[::stride].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the model holds, by name."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if any(hasattr(parameter, "quant_state") for parameter in module._parameters.values()):
            # To save a layer of 4 bits rearranges its weight; its shape is known without.
            found |= {f"{prefix}{name}": p for name, p in module._parameters.items() if p is not None}
        else:
            module._save_to_state_dict(found, prefix, keep_vars=True)
    return found


def _input_embedding(model: nn.Module) -> Tensor | None:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if callable(get_embeddings) else None
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) else None
