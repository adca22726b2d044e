"""Finds the sites of a model: the modules whose neurons can be measured, selected and trained.

A site is recognized by what it is made of (which projections it has, how their shapes fit, what its activation
computes), never by the name of its class, so that a model that nobody has seen yet is found as well.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.errors import SiteError

GATED_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATION_ATTRIBUTES = ("act_fn", "activation_fn", "act", "activation")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "relu2": lambda x: nn.functional.relu(x).square(),
}


@dataclass(frozen=True)
class Part:
    """What the units of a site own of one parameter: unit u has ``size`` slices from ``offset + u * stride`` on.

    Attributes:
        parameter: path of the parameter in the model, such as ``model.layers.3.mlp.gate_proj.weight``.
        dim: the dimension along which the units lie, of the parameter or, where it is stacked, of ``parameter[lead]``.
        offset: where the first unit begins along it.
        stride: from one unit to the next.
        size: slices of a unit.
        lead: index into the first dimension of a parameter that stacks those of several sites, such as experts.
    """

    parameter: str
    dim: int
    offset: int = 0
    stride: int = 1
    size: int = 1
    lead: int | None = None

    def index(self, units: Tensor) -> Tensor:
        """Returns the slices that belong to units, int64 [len(units) * size], in the order of the units."""
        first = self.offset + units.to(torch.int64) * self.stride
        return (first[:, None] + torch.arange(self.size, device=units.device)).flatten()


@dataclass(frozen=True)
class Site:
    """One family of units, and where it lives.

    Attributes:
        path: path of the module in the model, such as ``model.layers.3.mlp``.
        kind: family of the units; ``mlp`` for the channels of a gated MLP.
        width: number of units.
        layer: index of the transformer layer, from 0.
        gate, up: paths of the linear modules of which a unit is a row.
        down: path of the linear module of which a unit is a column.
        activation: name of the activation between them, a key of ``ACTIVATIONS``.
    """

    path: str
    kind: str
    width: int
    layer: int
    gate: str
    up: str
    down: str
    activation: str

    @property
    def parts(self) -> tuple[Part, ...]:
        """What the units own of the parameters of the model: all of it is trained together."""
        return Part(f"{self.gate}.weight", 0), Part(f"{self.up}.weight", 0), Part(f"{self.down}.weight", 1)

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields, as JSON holds them."""
        return asdict(self)


def find_sites(model: nn.Module) -> list[Site]:
    """Returns the sites of a model in the order of its layers.

    Raises:
        SiteError: no module of the model has the structure of a gated MLP.
    """
    sites = list(_gated_mlps(model))
    if not sites:
        raise SiteError(
            f"{type(model).__name__} has no module made of {', '.join(GATED_PROJECTIONS)} (linear, fitting shapes) "
            "with a known activation; clue_fast handles Llama-style models so far"
        )
    return sites


def projection(model: nn.Module, path: str) -> nn.Linear:
    """Returns the linear module at a path of a model, such as ``model.layers.3.mlp.gate_proj``."""
    module = model.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise SiteError(f"{path} is a {type(module).__name__}, not a linear module; it was changed since it was found")
    return module


def identify_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """Returns the name of the activation that a function computes, found by evaluating it, or None."""
    grid = torch.linspace(-6.0, 6.0, 97)
    try:
        with torch.no_grad():
            values = function(grid)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not isinstance(values, Tensor) or values.shape != grid.shape:
        return None
    for name, known in ACTIVATIONS.items():
        if torch.allclose(values, known(grid), rtol=1e-5, atol=1e-6):
            return name
    return None


def model_fingerprint(model: nn.Module) -> str:
    """Returns a short hash of what a model is: names and shapes of its weights, and a sample of its embedding.

    Unlearning trains neither, so a model keeps its fingerprint through it, while another architecture, or the same
    one with other weights, has another. The sample is rounded to bfloat16, so that loading in another precision
    does not matter.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
    embedding = _input_embedding(model)
    if embedding is not None and embedding.device.type != "meta":
        sample = embedding.detach().reshape(-1)
        stride = max(1, sample.numel() // 4096)
        digest.update(sample[::stride].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _gated_mlps(model: nn.Module) -> Iterator[Site]:
    for path, module in model.named_modules():
        children = [getattr(module, name, None) for name in GATED_PROJECTIONS]
        linear = [child for child in children if isinstance(child, nn.Linear)]
        if len(linear) != len(children):
            continue
        gate, up, down = linear
        if gate.weight.shape != up.weight.shape or down.in_features != gate.out_features:
            continue
        activation = _activation_of(module)
        if activation is None:
            continue
        prefix = f"{path}." if path else ""
        yield Site(
            path=path,
            kind="mlp",
            width=down.in_features,
            layer=_layer_index(path),
            gate=f"{prefix}gate_proj",
            up=f"{prefix}up_proj",
            down=f"{prefix}down_proj",
            activation=activation,
        )


def _activation_of(module: nn.Module) -> str | None:
    for name in ACTIVATION_ATTRIBUTES:
        function = getattr(module, name, None)
        if callable(function):
            return identify_activation(function)
    return None


def _layer_index(path: str) -> int:
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(numbers[0]) if numbers else 0


def _input_embedding(model: nn.Module) -> Tensor | None:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if callable(get_embeddings) else None
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) else None
