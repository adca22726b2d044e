"""How encoded records become batches: what a model can take, padding, and which positions predict an answer.

A model takes tokens that it has embeddings for, and as many as it has positions for. How labels relate to predictions
depends on its head, of which there are four: ``causal`` (position i predicts the label of token i + 1), ``seq2seq``
(the decoder's position i, which reads the token before, predicts label i), ``masked`` (a label is predicted at its own
position; token classification is the same) and ``classification`` (one label a record).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.errors import DataError, ObjectiveError
from clue_fast.sites import unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED_LABEL = -100
"""The label that Hugging Face losses skip."""

HEADS = ("causal", "seq2seq", "masked", "classification")

POSITIONS = re.compile(r"(^|_)(pos|positions?|wpe)(_|$)")
"""Names of position embeddings, such as ``wpe``, ``embed_positions`` and ``position_embeddings``."""


def head_of(model: nn.Module, labels: Tensor | None = None) -> str:
    """Returns which of ``HEADS`` a model has.

    Args:
        model: any; one that does not say whether it generates is taken for causal.
        labels: of a batch; one label a record makes it a classification.

    Raises:
        ObjectiveError: the labels are real numbers or several yes/no answers, which have no likelihood here.
    """
    if labels is not None and labels.is_floating_point():
        raise ObjectiveError(
            "the labels are real numbers (regression, or several labels a record); objectives work on "
            "the probability of one label: use a head with a softmax"
        )
    if labels is not None and labels.dim() == 1:
        return "classification"
    inner: Any = unwrap(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    can_generate = getattr(inner, "can_generate", None)
    return "masked" if callable(can_generate) and not can_generate() else "causal"


def has_head(model: nn.Module) -> bool:
    """Returns whether a model predicts anything: not so the layers of a Hugging Face model alone, as of AutoModel."""
    inner: Any = unwrap(model)
    alone = getattr(inner, "base_model", None) is inner
    return not alone or inner.can_generate() or inner.get_output_embeddings() is not None


def shift_labels(labels: Tensor, head: str = "causal") -> Tensor:
    """Returns the label that each position predicts, -100 where it predicts none.

    Args:
        labels: [..., positions] int64, each where its token stands; -100 where the token is no answer.
        head: one of ``HEADS``. Only with a causal head labels move: each to the position before its token. What the
            first token is, nothing predicts; the last position predicts nothing that is known.
    """
    if head != "causal":
        return labels
    return functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)


def answer_mask(labels: Tensor, head: str = "causal") -> Tensor:
    """Returns which positions predict an answer, bool in the shape of the labels: those that count.

    Args:
        labels, head: see ``shift_labels``.
    """
    return shift_labels(labels, head) != IGNORED_LABEL


def is_padded_right(attention_mask: Tensor) -> bool:
    """Whether a mask is [records, tokens] and lets each record attend to its first tokens, however many, alone."""
    if attention_mask.dim() != 2:
        return False
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return bool((attention_mask == (places < attention_mask.sum(-1, keepdim=True))).all())


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


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into one batch.

    Called with a list of examples, it returns `input_ids`, `attention_mask` and `labels`, int64 [examples,
    longest].
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Pads and stacks the examples."""
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long, device="cpu"),
            "attention_mask": torch.zeros(shape, dtype=torch.long, device="cpu"),
            "labels": torch.full(shape, IGNORED_LABEL, dtype=torch.long, device="cpu"),
        }
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][row, :length] = torch.as_tensor(example["input_ids"], device="cpu")
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.as_tensor(example["labels"], device="cpu")
        return batch


def padding_token(tokenizer: PreTrainedTokenizerBase | None, model: nn.Module | None = None) -> int:
    """The token id to pad with: the tokenizer's own, or else its end-of-sequence token.

    For a model that has embeddings for neither, it is that of its configuration, or 0: padding is masked from attention
    and loss, so that any token will do.

    Raises:
        DataError: no model is given, and the tokenizer has neither.
    """
    tokens = [] if tokenizer is None else [tokenizer.pad_token_id, tokenizer.eos_token_id]
    size = None
    if model is not None:
        tokens += [getattr(getattr(model, "config", None), "pad_token_id", None), 0]
        size = vocabulary_size(model)
    for token in tokens:
        if token is not None and token >= 0 and (size is None or token < size):
            return int(token)
    raise DataError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: little is padded, and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
