"""Wrappers around a model that change nothing of what it is."""

from __future__ import annotations

from torch import nn

_WRAPPED = {"_orig_mod", "module"}  # torch.compile; DistributedDataParallel and DataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the model inside of torch.compile and DistributedDataParallel: paths and names are always of that."""
    while len(children := dict(model.named_children())) == 1 and children.keys() <= _WRAPPED:
        (model,) = children.values()
    return model
