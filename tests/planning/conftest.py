"""A small Llama as a folder, what a training of it really takes, and one thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clue_fast.config.planning import PlanConfig
from tests.models.small_llama import llama, one_thread  # noqa: F401

SIZES = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 512, "layers": 6}
"""Of which heads share keys and values two by two."""

CONFIG = {
    "max_length": 32,
    "answer_tokens": 20,
    "fraction": 0.1,
    "batch_size": 3,
    "retain_ratio": 2,
    "criterion": "random",  # which runs nothing: most look at the training
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], str]:
    """save(model) -> a folder with its configuration and nothing else."""

    def save(model: Any) -> str:
        model.config.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.fixture
def trained_beside(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """trained_beside(*names): plans have of the ways to train beside the selected units these alone.

    Each takes as long as the rest of a plan.
    """
    from clue_fast.planning import planned

    every = planned._beside

    def choose(*names: str) -> None:
        def some(dtype: torch.dtype, rank: int) -> list[Any]:
            return [method for method in every(dtype, rank) if method.name in names]

        monkeypatch.setattr(planned, "_beside", some)

    return choose


@pytest.fixture
def make_plan(save: Callable[[Any], str], trained_beside: Callable[..., None]) -> Callable[..., Any]:
    """make_plan(model, beside=names, **settings) -> the plan of what the other fixtures do."""
    from clue_fast.planning import plan

    def make(model: Any, beside: Sequence[str] = (), **settings: Any) -> Any:
        trained_beside(*beside)
        dtype = str(model.dtype).removeprefix("torch.")
        return plan(save(model), PlanConfig(**{"dtype": dtype, **CONFIG, **settings}))

    return make


@pytest.fixture
def make_small() -> Callable[..., Any]:
    """make_small(dtype, **config) -> a Llama of six layers with tied embeddings, in training mode."""

    def make(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
        return llama(dtype, **{**SIZES, "tie_word_embeddings": True, **config}).train()

    return make


def records(number: int, seed: int, vocabulary: int = 512) -> dict[str, Tensor]:
    """Records as planned: of 32 tokens, of which the last 20 are the answer. One is padded, so that there is a mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (number, 32), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :12] = -100
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def batches() -> dict[str, dict[str, Tensor]]:
    """Three forget records and six retain records."""
    return {"forget": records(3, 1), "retain": records(6, 2)}
