"""Real weights and texts that they write, and how often a model runs."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Makes a Llama of two layers and random weights, the same ones each time, for a tokenizer."""

    def make(tokenizer: PreTrainedTokenizerFast, width: int, units: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=units,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def _baby_llama(data_dir: Path) -> LlamaForCausalLM:
    from convert_llama2c import read_llama2c

    return read_llama2c(data_dir / "models" / "babyllama_tok105" / "model5000.bin").eval()


@pytest.fixture
def baby_llama(_baby_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """The real weights of BabyLlama in float32, a fresh copy."""
    return copy.deepcopy(_baby_llama)


@pytest.fixture(scope="session")
def stories(_baby_llama: LlamaForCausalLM) -> list[list[dict[str, list[int]]]]:
    """Forget and retain examples, as the model writes them: prompts of 6 tokens, answers of several lengths."""
    torch.manual_seed(0)
    texts = _baby_llama.generate(
        torch.full((9, 1), 1), do_sample=True, max_new_tokens=39, min_new_tokens=39, top_k=0, pad_token_id=0
    ).tolist()
    lengths = [40, 31, 22, 40, 17, 12, 35, 28, 9]
    examples = [
        {"input_ids": text[:length], "labels": [-100] * 6 + text[6:length]}
        for text, length in zip(texts, lengths, strict=True)
    ]
    return [examples[:4], examples[4:]]


class Passes:
    """How many rows a model saw, forward and backward."""

    forward = 0
    backward = 0


@contextmanager
def counted_passes(model: nn.Module) -> Iterator[Passes]:
    """Counts the records that enter the first layer, and those whose gradient comes back to the last layer."""
    passes = Passes()

    def forward(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        passes.forward += output.shape[0]
        if output.requires_grad:
            output.register_hook(lambda grad: setattr(passes, "backward", passes.backward + grad.shape[0]))

    handle = model.get_submodule("model.norm").register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()
