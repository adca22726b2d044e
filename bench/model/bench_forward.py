"""Forward of a small Llama: stock, compiled, patched, recording without and with scores, and with hooks that do it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import clue_fast
from bench import liger, machine
from bench.interleaved import Case, Comparison, Target
from bench.ops.bench_gated_activation import collect


@dataclass(frozen=True)
class Shape:
    """layers x width / units, and a batch of records x tokens."""

    layers: int
    width: int
    units: int
    records: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.layers} layers x {self.width}/{self.units}, {self.records} x {self.tokens} tokens"


# The demo's order of size; a middle one; the layers of a 0.3B model; four of the layers of an 8B model, for a GPU.
SHAPES = [
    Shape(4, 256, 704, 8, 64),
    Shape(6, 512, 1408, 4, 256),
    Shape(3, 1024, 2816, 2, 512),
    pytest.param(Shape(4, 4096, 14336, 4, 1024), marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16]
CASES = ("stock", "compiled", "patched", "recording", "with scores", "hooks")


class Hooks:
    """The statistics of clue_fast by forward hooks on every down_proj, as one would write them in PyTorch.

    Every token counts into one group, which spares the hooks the sorting by group.
    """

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if name.endswith("down_proj"):
                device = module.weight.device
                self.sums[name] = torch.zeros(5, module.in_features, dtype=torch.float64, device=device)
                module.register_forward_pre_hook(
                    lambda _, inputs, sums=self.sums[name]: collect(inputs[0].flatten(0, -2), sums)
                )


@contextmanager
def cases(shape: Shape, dtype: torch.dtype) -> Iterator[dict[str, Case]]:
    """One model for every case, all with the same weights and the same tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=shape.width,
        intermediate_size=shape.units,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        use_cache=False,
    )
    stock = LlamaForCausalLM(config).to(machine.device(), dtype).eval()
    tokens = torch.randint(config.vocab_size, (shape.records, shape.tokens), device=machine.device())
    names = [*CASES, *(["liger"] if machine.on_gpu() and liger.available() else [])]
    models = {"stock": stock} | {name: copy.deepcopy(stock) for name in names[1:]}
    models["compiled"].compile()
    if "liger" in models:
        liger.patch(models["liger"])
    clue_fast.patch(models["patched"])
    Hooks(models["hooks"])
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(clue_fast.patch(models["recording"]).record("forget"))
        stack.enter_context(clue_fast.patch(models["with scores"]).record("forget", score="difference"))
        yield {name: lambda model=model: model(tokens) for name, model in models.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_forward(compare, shape: Shape, dtype: torch.dtype) -> None:
    """With its targets."""
    targets = [Target("recording", "stock", 1.0), Target("recording", "stock", 1.05)]
    targets += [Target("with scores", "recording", 1.01)]
    with cases(shape, dtype) as all_cases:
        compare(Comparison(f"forward, {shape}, {str(dtype)[6:]}", all_cases, targets))
