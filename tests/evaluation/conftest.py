"""A Llama with random weights that says something definite, and records to ask it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.demo.pretraining import train_tokenizer

RECORDS = [
    Record("Who built the quay?", "Ada and her two sons.", perturbed=("Nobody at all.", "Ben.", "Carla and Dan.")),
    Record("Where?", "In Orvandel.", paraphrase="It is in Orvandel.", perturbed=("In Mistrum.", "At sea.")),
    Record("When was the very last stone of the long quay laid?", "1815", perturbed=("1816",)),
    Record("Why?", "For the salt, of course, and for nothing else.", perturbed=("For fun.", "No reason.")),
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(RECORDS, vocab_size=300)


@pytest.fixture(scope="session")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def records() -> list[Record]:
    return list(RECORDS)
