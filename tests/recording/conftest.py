"""Small models: a random Llama, and the real weights of BabyLlama."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A Llama of 3 layers x 64 with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def _baby_llama(data_dir: Path) -> LlamaForCausalLM:
    from convert_llama2c import read_llama2c

    return read_llama2c(data_dir / "models" / "babyllama_tok105" / "model5000.bin")


@pytest.fixture
def baby_llama(_baby_llama: LlamaForCausalLM) -> LlamaForCausalLM:
    """The real weights of BabyLlama in float32, a fresh copy."""
    import copy

    return copy.deepcopy(_baby_llama)
