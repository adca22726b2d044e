"""Fixtures of tests that train: a small Llama, selections in it, batches, examples and arguments of a Trainer.

Another Llama has a tokenizer that was made from facts.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.demo.facts import FACTS
from clue_fast.demo.pretraining import train_tokenizer
from tests.models.small_llama import (  # noqa: F401
    make_arguments,
    make_batch,
    make_examples,
    make_model,
    make_selection,
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    records = [form for facts in FACTS.values() for fact in facts for form in (fact.record(), *fact.rewordings())]
    return train_tokenizer(records, vocab_size=512)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()
