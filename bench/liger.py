"""Liger's fused activations, where liger-kernel is installed (Hsu et al. 2024, arXiv 2410.10989)."""

from __future__ import annotations

import importlib.util
from types import MethodType

from torch import Tensor, nn


def available() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Their kernel for act(gate) * up; "silu" or "gelu_tanh"."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    function = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}[activation]
    out: Tensor = function.apply(gate, up)
    return out


def patch(model: nn.Module) -> None:
    """Lets the MLPs of this Llama alone run it; their own function would change the class for all models."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated_activation(self.gate_proj(x), self.up_proj(x), "silu"))
        return out

    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            module.forward = MethodType(forward, module)
