"""The state a model is evaluated in, and left as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device and restores the mode of every module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module in training:
            module.training = True


def progress_bar(total: int, description: str, shown: bool, unit: str = "record") -> tqdm[Any]:
    """A bar over records, or what else the unit says; it appears only when the work takes longer than a second."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=not shown, delay=1.0, leave=False)
