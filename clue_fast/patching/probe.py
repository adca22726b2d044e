"""The probe: a patched module against its own forward, on a few random tokens and its real weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clue_fast.errors import NonFiniteError, SiteError
from clue_fast.sites import Site

TOKENS = 3


def can_probe(module: nn.Module) -> str | None:
    """Returns None if the weights of a module are there to be read, or else why not."""
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "its weights are not loaded"
        if hasattr(parameter, "full_tensor") or parameter.numel() == 0:
            return "its weights are sharded"
    return None


@torch.no_grad()
def probe(site: Site, module: nn.Module, fused: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Compares a module with the forward that is to replace its own.

    Raises:
        NonFiniteError: the module gives NaN or infinity on finite input.
        SiteError: the forwards differ by more than rounding.
    """
    modes = [(child, child.training) for child in module.modules()]
    for child, _ in modes:
        child.training = False
    try:
        expected, found = module(*inputs), fused(*inputs)
    finally:
        for child, training in modes:
            child.training = training
    if not bool(torch.isfinite(expected).all()):
        raise NonFiniteError(f"{site.path} gives NaN or infinity on finite input; check the weights of the model")
    expected, found = expected.double(), found.double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if error > 8 * torch.finfo(inputs[0].dtype).eps:
        remedy = "leave experts out of kinds" if site.kind == "expert" else "record it with strict=False"
        raise SiteError(
            f"{site.path} ({type(module).__name__}) does not compute down(act(gate) · up): off by {error:.1e}; {remedy}"
        )


def random_input(module: nn.Module, channels: int) -> Tensor:
    """Returns a few tokens for a module, [1, tokens, channels], in the precision and on the device of its weights."""
    parameters = [*module.parameters(), torch.empty(0, device="cpu")]
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, TOKENS, channels, generator=generator, device="cpu").to(parameters[0].device, dtype)
