"""The operators in the dispatcher, for torch.compile and export: namespace `clue_fast`, on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "clue_fast"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an operator: what it computes on any device, and what it returns for tensors without data."""
    name = schema.partition("(")[0]
    _library.define(schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def define_autograd(name: str, run: Callable[..., Any]) -> None:
    """Give an operator its autograd by hand: `register_autograd` takes none that writes into an argument."""
    _library.impl(name, run, "Autograd")  # type: ignore[no-untyped-call]
