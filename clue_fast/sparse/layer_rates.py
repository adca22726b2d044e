"""The learning rate of each layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

LayerRate: TypeAlias = "float | Mapping[int, float] | Callable[[int, int], float]"
"""The rate of layer l of L over that of the first. A number is the ratio of the last layer to the first,
geometric in between: ``ratio ** (l / (L - 1))``, so that it means the same at any depth; 1 is uniform, above 1
the rate rises. A mapping names every layer that trains. A function is called with l and L."""


@dataclass(frozen=True)
class LinearLayerRate:
    """A rate that falls (or rises) by the same amount from layer to layer: ``1 + (ratio - 1) * l / (L - 1)``.

    Attributes:
        ratio: the rate of the last layer over that of the first; at least 0.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < math.inf:
            raise ValueError(f"ratio {self.ratio} of a linear layer_lr is not a number from 0 on")

    def __call__(self, layer: int, layers: int) -> float:
        """Returns the rate of a layer over that of the first."""
        return 1.0 + (self.ratio - 1.0) * _depth(layer, layers)


def layer_scale(layer_lr: LayerRate, layer: int, layers: int) -> float:
    """Returns the rate of a layer over that of the first.

    Args:
        layer_lr: see ``LayerRate``.
        layer: index of the layer, from 0.
        layers: how many layers the model has.

    Raises:
        ValueError: a ratio is not above 0, a mapping lacks the layer or names one that does not exist, or the
            result is negative, infinite or NaN.
    """
    if callable(layer_lr):
        scale = float(layer_lr(layer, layers))
    elif isinstance(layer_lr, Mapping):
        scale = _mapped(layer_lr, layer, layers)
    else:
        if not 0.0 < layer_lr < math.inf:
            raise ValueError(f"layer_lr {layer_lr} is not above 0")
        scale = layer_lr ** _depth(layer, layers)
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"layer_lr gives layer {layer} the scale {scale}; give it a number from 0 on")
    return scale


def _mapped(layer_lr: Mapping[int, float], layer: int, layers: int) -> float:
    if unknown := sorted(set(layer_lr) - set(range(layers))):
        raise ValueError(f"layer_lr names layer {unknown[0]}, the model has layers 0 to {layers - 1}")
    if layer not in layer_lr:
        raise ValueError(f"layer_lr says nothing of layer {layer}, which has units to train; add it, or 0 to freeze it")
    return float(layer_lr[layer])


def _depth(layer: int, layers: int) -> float:
    return layer / max(1, layers - 1)
