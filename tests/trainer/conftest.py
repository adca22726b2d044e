"""Fixtures of tests that train: a small Llama, selections in it, batches, examples and arguments of a Trainer."""

import pytest

from clue_fast.objectives import passes
from tests.models.small_llama import (  # noqa: F401
    make_arguments,
    make_batch,
    make_examples,
    make_model,
    make_selection,
    one_thread,
)


@pytest.fixture
def one_pass(monkeypatch):
    """All records of a step run in one pass, padded to the longest."""
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 10**6, "cuda": 10**6})
