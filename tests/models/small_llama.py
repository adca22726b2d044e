"""A Llama small enough to train in milliseconds, selections in it, and records for it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clue_fast.selection import CONFLICT, FORGET, Selection
from clue_fast.sites import find_sites, model_fingerprint

VOCABULARY = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def llama(dtype: torch.dtype = torch.float32, layers: int = 3, seed: int = 0, **config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**settings | config))
    for parameter in model.parameters():  # as from_pretrained does, which leaves the rotary buffers in float32
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """make_model(dtype, layers=3, seed=0, **config) -> a Llama with random weights that says something definite."""
    return llama


def random_selection(
    model: nn.Module, units: int = 5, layers: list[int] | None = None, seed: int = 0, forget: int = 0
) -> Selection:
    sites = tuple(find_sites(model))
    generator = torch.Generator().manual_seed(seed)
    categories, scores = {}, {}
    for site in sites:
        categories[site] = torch.zeros(site.width, dtype=torch.int8)
        scores[site] = torch.rand(site.width, generator=generator)
        if layers is None or site.layer in layers:
            order = torch.randperm(site.width, generator=generator)
            categories[site][order[:units]] = CONFLICT
            categories[site][order[units : units + forget]] = FORGET
    return Selection(sites, categories, scores, {"criterion": "random"}, model_fingerprint(model))


@pytest.fixture
def make_selection() -> Callable[..., Selection]:
    """make_selection(model, units=5, layers=None, seed=0, forget=0) -> random units in each of the layers (all).

    So many conflict units, and so many forget units.
    """
    return random_selection


@pytest.fixture
def make_batch() -> Callable[..., dict[str, Tensor]]:
    """make_batch(records=4, seed=0) -> right-padded batch of records of different length, the prompt not counted."""

    def make(records: int = 4, seed: int = 0) -> dict[str, Tensor]:
        from clue_fast.data import Collator

        return Collator(0)(examples(records, seed))

    return make


@pytest.fixture
def make_examples() -> Callable[..., list[dict[str, list[int]]]]:
    """make_examples(records, seed=0) -> encoded records of different length."""
    return examples


def examples(records: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    made = []
    for _ in range(records):
        prompt = [1] + [generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(2, 5))]
        answer = [generator.randrange(3, VOCABULARY) for _ in range(generator.randrange(1, 7))] + [2]
        made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


@pytest.fixture
def make_arguments(tmp_path: Any) -> Callable[..., Any]:
    """make_arguments(**settings) -> quiet TrainingArguments on the CPU that save nothing unless asked to."""

    def make(**settings: Any) -> Any:
        from transformers import TrainingArguments

        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "linear",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "log_level": "error",
        }
        return TrainingArguments(**defaults | settings)

    return make
