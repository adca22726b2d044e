"""The model of a training, patched so that its MLPs are fused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from clue_fast.errors import SiteError
from clue_fast.patching import Patched, patch, patched_of


@contextmanager
def fused(model: nn.Module) -> Iterator[Patched | None]:
    """Patches the model for as long as the context lasts.

    Yields None, and leaves the model alone, where it is patched already or has nothing to fuse, such as heads alone.
    """
    try:
        patched = None if patched_of(model) is not None else patch(model, strict=False)
    except SiteError:
        patched = None
    if patched is None:
        yield None
        return
    with patched:
        yield patched
