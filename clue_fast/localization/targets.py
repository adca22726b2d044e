"""Targets: the scalar function of an answer that is differentiated to see what a unit does for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.labels import answer_mask, shift_labels


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    others = torch.logsumexp(logits.scatter(1, labels, float("-inf")), dim=1)
    return logits.gather(1, labels).squeeze(1) - others


def _logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels).squeeze(1)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels.squeeze(1), reduction="none")


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.softmax(dim=1).gather(1, labels).squeeze(1)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_odds": _log_odds,
    "logit": _logit,
    "loss": _loss,
    "probability": _probability,
}
"""By name, from logits [tokens, vocabulary] float32 and labels [tokens, 1] to one value a token."""


def check_target(name: str) -> str:
    """Returns the name of a target. Raises UnknownNameError."""
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return name


def answer_target(logits: Tensor, labels: Tensor, target: str, head: str = "causal") -> tuple[Tensor, Tensor]:
    """The target of every answer token, where it is predicted.

    The gradients of ``loss`` and ``probability`` vanish where an answer is memorized; those of ``log_odds``,
    log p - log(1 - p), and ``logit`` do not.

    Args:
        logits: [records, tokens, vocabulary].
        labels: [records, tokens] int64, -100 where the token is no answer.
        target: a key of ``TARGETS``.
        head: of the model, see ``clue_fast.labels``.

    Returns:
        The values, [answer tokens] float32, and the record of each, int64.
    """
    chosen = TARGETS[check_target(target)]
    answer = answer_mask(labels, head)
    rows = torch.nonzero(answer)[:, 0]
    # float64 stays, as a reference may want it
    selected = logits[answer]
    wide = selected if selected.dtype == torch.float64 else selected.float()
    return chosen(wide, shift_labels(labels, head)[answer][:, None]), rows


def record_target(logits: Tensor, labels: Tensor, target: str, head: str = "causal") -> Tensor:
    """The mean of the target over the answer tokens of each record, [records] float32; arguments as above."""
    values, rows = answer_target(logits, labels, target, head)
    counts = torch.bincount(rows, minlength=labels.shape[0]).clamp_min(1)
    return torch.zeros(labels.shape[0], dtype=values.dtype, device=values.device).index_add(0, rows, values) / counts
