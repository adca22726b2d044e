"""The norms around attention and MLP as what they are at one token: a scale, weights, and a derivative."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.errors import CircuitError

PROBE = 100.0  # so large that the epsilon of the norm does not count


@dataclass(frozen=True)
class Norm:
    """An RMSNorm or LayerNorm y = scale(x) · weight · center(x) + shift, where scale is 1 / rms(center(x)).

    Attributes:
        weight, shift: [width].
        centered: whether the mean is subtracted, as LayerNorm does.
    """

    weight: Tensor
    shift: Tensor
    centered: bool
    module: nn.Module

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, like: Tensor) -> Norm:
        """Finds out what a module computes by trying it.

        Args:
            module: the norm.
            like: [tokens, width], of the precision and device to compute in; what the norm is tried on.

        Raises:
            CircuitError: it is neither an RMSNorm nor a LayerNorm.
        """
        shift = _apply(module, torch.zeros_like(like[:1]))[0]
        y = _apply(module, like)
        centered = bool(torch.allclose(_apply(module, like + 1.0), y, rtol=1e-2, atol=1e-3))
        signs = torch.ones_like(like[:1])
        signs[:, ::2] = -1.0 if centered else 1.0
        norm = cls((_apply(module, PROBE * signs)[0] - shift) / signs[0], shift, centered, module)
        error = float((norm.scale(like) * norm.weight * norm.center(like) + shift - y).norm())
        if error > 1e-2 * float(y.norm()):
            raise CircuitError(f"{type(module).__name__} is neither an RMSNorm nor a LayerNorm")
        return norm

    def center(self, x: Tensor) -> Tensor:
        """Returns x [..., width], without its mean if that is subtracted."""
        return x - x.mean(-1, keepdim=True) if self.centered else x

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        """The scale at x [tokens, width], [tokens, 1]: what the module makes of it, compared with what it got."""
        y = _apply(self.module, x) - self.shift
        direction = self.weight * self.center(x)
        return (direction * y).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30)

    def part(self, x: Tensor, part: Tensor) -> Tensor:
        """What a part [..., tokens, width] of x [tokens, width] contributes to the norm of x, at the scale of x."""
        return self.scale(x) * self.weight * self.center(part)

    def before(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient with respect to x [tokens, width], from that with respect to its norm [..., tokens, width].

        d y / d x = scale · weight · (1 - scale² c cᵀ / width) · center, with c = center(x).
        """
        scale, centered = self.scale(x), self.center(x)
        weighted = gradient * (scale * self.weight)
        along = torch.einsum("...tw,tw->...t", weighted, centered)[..., None] * scale.square() / x.shape[-1]
        return self.center(torch.addcmul(weighted, along, centered, value=-1.0))


def _apply(module: nn.Module, x: Tensor) -> Tensor:
    """The norm of x, with its weights in the precision of x."""
    weights = {name: weight.detach().to(x.dtype) for name, weight in module.named_parameters()}
    normed: Tensor = torch.func.functional_call(module, weights, (x,))
    return normed
