"""How labels relate to predictions: the label that each position predicts, and so which positions count as answers.

Four kinds of heads are told apart by it: ``causal`` (position i predicts the label of token i + 1), ``seq2seq`` (the
decoder's position i, which reads the token before, predicts label i), ``masked`` (a label is predicted at its own
position; token classification is the same) and ``classification`` (one label a record).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from clue_fast.errors import ObjectiveError
from clue_fast.sites import unwrap

IGNORED_LABEL = -100
"""The label that Hugging Face losses skip."""

HEADS = ("causal", "seq2seq", "masked", "classification")


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
