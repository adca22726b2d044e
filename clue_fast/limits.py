"""What a model can take: tokens that it has embeddings for, and as many as it has positions for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from clue_fast.errors import DataError

POSITIONS = re.compile(r"(^|_)(pos|positions?|wpe)(_|$)")
"""Names of position embeddings, such as ``wpe``, ``embed_positions`` and ``position_embeddings``."""


def vocabulary_size(model: nn.Module) -> int | None:
    """How many tokens the model has embeddings for; None where it does not tell."""
    embedding = _embedding(model)
    # Sharded weights have fewer rows than the embedding.
    return None if embedding is None else getattr(embedding, "num_embeddings", None)


def position_limit(model: nn.Module) -> int | None:
    """How many tokens the model has positions for, if it looks positions up in a table (GPT-2, OPT, GPT-J).

    None for a model that computes them (rotary, ALiBi): it takes any number, whatever that does to its answers.
    """
    embedding = _embedding(model)
    beside = next((one for one in model.modules() if any(child is embedding for child in one.children())), None)
    tables = [] if beside is None else [m for name, m in beside.named_children() if POSITIONS.search(name)]
    limits = [_positions(table) for table in tables if isinstance(table, nn.Embedding)]
    limits += [len(table) for name, table in model.named_buffers() if name.endswith(".embed_positions")]
    return min(limits, default=None)


def longest(model: nn.Module, max_length: int | None) -> int | None:
    """The longest example, in tokens, that both ``max_length`` and the model's positions allow; None: any."""
    limits = [limit for limit in (max_length, position_limit(model)) if limit is not None]
    return min(limits, default=None)


def check_examples(examples: Sequence[Mapping[str, Sequence[int]]], model: nn.Module, name: str | None = None) -> None:
    """Checks that a model can take encoded records.

    Args:
        examples: with ``input_ids``.
        model: the model.
        name: of the data set, for the error.

    Raises:
        DataError: an example has a token without an embedding, or more tokens than there are positions.
    """
    size, positions = vocabulary_size(model), position_limit(model)
    for number, example in enumerate(examples, start=1):
        place = f"record {number}" if name is None else f"record {number} of the {name} set"
        tokens = example["input_ids"]
        if size is not None and not 0 <= min(tokens, default=0) <= max(tokens, default=0) < size:
            token = next(token for token in tokens if not 0 <= token < size)
            raise DataError(
                f"{place} has the token {token}, and the model has embeddings for {size} tokens; use the model's own "
                "tokenizer, or call model.resize_token_embeddings"
            )
        if positions is not None and len(tokens) > positions:
            raise DataError(
                f"{place} has {len(tokens)} tokens, and the model has positions for {positions}; shorten it"
            )


def _embedding(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = None if get is None else get()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _positions(table: nn.Embedding) -> int:
    """Positions of a table; those of OPT begin behind ``offset`` rows, those of RoBERTa behind the padding's."""
    offset = getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1)
    return int(table.num_embeddings) - int(offset)
