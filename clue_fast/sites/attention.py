"""Attention heads."""

from __future__ import annotations

from torch import nn

HEAD_SIZES = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")


def head_size(module: nn.Module) -> int | None:
    """Returns the channels of one head, if a module says that it has heads."""
    sizes = (getattr(module, name, None) for name in HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int)), None)
