"""Fixtures of tests that train: a small Llama, selections in it, batches, examples and arguments of a Trainer."""

from tests.models.small_llama import (  # noqa: F401
    make_arguments,
    make_batch,
    make_examples,
    make_model,
    make_selection,
)
