"""Gradient checkpointing of a sparse model, with no backward below the lowest selected layer.

transformers makes the embeddings need a gradient as soon as checkpointing is on, since reentrant checkpointing drops
the gradients of a layer whose input needs none. Then a backward runs through every layer. Here only the layers that
train get such an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from clue_fast.training.parts import TrainedPart


def limit_checkpointing(model: nn.Module, parts: Iterable[TrainedPart]) -> None:
    """Lets checkpointing, where it is on, run a backward through the layers that train and those above only."""
    disable = getattr(model, "disable_input_require_grads", None)
    if callable(disable):
        disable()
    paths = [part.path for part in parts]
    for path, module in model.named_modules():
        checkpoint: Any = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(checkpoint, "keywords", {}).get("use_reentrant", False):
            trains = any(name.startswith(f"{path}.") for name in paths)
            setattr(module, "_gradient_checkpointing_func", _Limited(checkpoint, trains))  # noqa: B010


class _Limited:
    """A reentrant checkpoint function: gives a layer that trains an input with a gradient, and skips those below."""

    def __init__(self, checkpoint: Callable[..., Any], trains: bool) -> None:
        self.checkpoint = checkpoint
        self.trains = trains

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
            if not self.trains:
                return function(*given)
            place = next(i for i, v in enumerate(given) if isinstance(v, Tensor) and v.is_floating_point())
            given[place] = given[place].detach().requires_grad_()
        return self.checkpoint(function, *given, **kwargs)
