"""How likely a model finds given answers, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clue_fast.data import Collator, Record, batches_by_length, encode_for, padding_token
from clue_fast.evaluation.state import evaluating, progress_bar
from clue_fast.labels import answer_mask, shift_labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerScore:
    """One answer under teacher forcing, its end-of-sequence token included.

    Attributes:
        loss: mean negative log-likelihood of its tokens, in nats.
        accuracy: share of its tokens that are the model's first choice.
    """

    loss: float
    accuracy: float


def score_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "scoring answers",
) -> list[AnswerScore]:
    """Scores each record's completion given its prompt, in the order of the records.

    Log-probabilities are taken in float32 whatever the model's dtype. Of a record longer than ``max_length``, or than
    the model has positions for, the tokens that are left count.

    Raises:
        DataError: a record keeps no answer token within `max_length`.
    """
    examples = encode_for(model, records, tokenizer, max_length)
    collate = Collator(padding_token(tokenizer, model))
    scores: list[AnswerScore | None] = [None] * len(examples)
    batches = batches_by_length([len(example["input_ids"]) for example in examples], batch_size)
    with evaluating(model) as device, progress_bar(len(examples), description, progress) as bar:
        for batch in batches:
            inputs = {name: x.to(device) for name, x in collate([examples[i] for i in batch]).items()}
            labels = inputs.pop("labels")
            for index, score in zip(batch, _score_batch(model(**inputs, use_cache=False).logits, labels), strict=True):
                scores[index] = score
            bar.update(len(batch))
    return [score for score in scores if score is not None]


def _score_batch(logits: Tensor, labels: Tensor) -> list[AnswerScore]:
    """logits: [examples, tokens, vocabulary], labels: [examples, tokens]."""
    answered = answer_mask(labels)
    chosen, targets = logits[answered].float(), shift_labels(labels)[answered]
    losses = nn.functional.cross_entropy(chosen, targets, reduction="none").double()
    right = chosen.argmax(-1) == targets
    lengths = answered.sum(1).tolist()
    return [
        AnswerScore(loss.mean().item(), hits.double().mean().item())
        for loss, hits in zip(torch.split(losses, lengths), torch.split(right, lengths), strict=True)
    ]
