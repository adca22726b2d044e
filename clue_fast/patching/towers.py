"""The towers of a model: which of its parts sees which tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from clue_fast.patching.tokens import DECODER, ENCODER, IMAGES, TEXT
from clue_fast.sites import unwrap

_OTHER_SENSES = ("vision_config", "audio_config")


def entry(model: nn.Module) -> nn.Module:
    """Returns the model proper, below all wrappers and peft: its forward takes the batch."""
    model = unwrap(model)
    while callable(get_base_model := getattr(model, "get_base_model", None)):
        model = unwrap(get_base_model())
    return model


def find_towers(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the modules whose tokens are not those of the model's own inputs, with their names.

    An encoder and a decoder take tokens of their own. Beside the language model of a vision-language model,
    everything sees images.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return {model.get_encoder(): ENCODER, model.get_decoder(): DECODER}  # type: ignore[operator]
    if getattr(model, "main_input_name", None) == "pixel_values":
        return {model: IMAGES}
    if any(getattr(config, name, None) is not None for name in _OTHER_SENSES):
        return {model: IMAGES, model.get_decoder(): TEXT}  # type: ignore[operator]
    return {}


def tower_of(path: str, towers: Mapping[str, str]) -> str:
    """Returns the tower that a module belongs to.

    Args:
        path: of the module.
        towers: name of the tower by path of its module; the innermost counts.
    """
    holding = [root for root in towers if root == "" or path == root or path.startswith(f"{root}.")]
    return towers[max(holding, key=len)] if holding else TEXT


def image_token(model: nn.Module) -> int | None:
    """Returns the id of the token that stands for a piece of an image, if the model has one."""
    config: Any = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return next((token for token in found if isinstance(token, int)), None)
