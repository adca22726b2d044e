"""Keeps no more of an update than it takes.

The shrinking of an update to a target, decided on forget questions that the report can leave out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clue_fast.data import Record
from clue_fast.errors import DataError
from clue_fast.evaluation import ANSWERED, greedy_answers, rouge_recall
from clue_fast.objectives import Objective, get_objective
from clue_fast.sparse import Sparse
from clue_fast.trainer.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def shrink(sparse: Sparse, enough: Callable[[], bool], steps: int = 5) -> float:
    """Shrinks the update to the smallest share of it that is still enough, found by bisection.

    The selected weights become original + share * (trained - original). What was forgotten goes on being forgotten
    for a good part of the way back, while what was damaged on the way heals. A share for a whole update, chosen by
    what the model then does, is the scaling coefficient of task vectors: Ilharco et al. 2023, "Editing Models with
    Task Arithmetic" (arXiv 2212.04089).

    Args:
        sparse: after training.
        enough: whether the model, as it is at the moment, will do.
        steps: of the bisection; the share is found to within 2 ** -steps.

    Returns:
        The share that was kept: 1 if nothing less is enough, or not even the whole.
    """
    if not enough():
        return 1.0
    originals = [part.original.float() for part in sparse.parts]
    trained = [part.selected.detach().clone() if part.has_master else part.read().float() for part in sparse.parts]

    def keep(share: float) -> None:
        for part, before, after in zip(sparse.parts, originals, trained, strict=True):
            part.set_values(after if share == 1.0 else torch.lerp(before, after, share))

    too_little, share = 0.0, 1.0
    for _ in range(steps):
        middle = (too_little + share) / 2
        keep(middle)
        if enough():
            share = middle
        else:
            too_little = middle
    keep(share)
    return share


FEWEST = 4
"""Forget records below which a part to decide on and a part to report mean nothing."""

REPORTED = "forget_reported"
"""The set, in an evaluation, of the forget records that were not looked at."""


@dataclass(frozen=True)
class Split:
    """Indices of the forget records: ``validation``, which shrinking decides on, and ``reported``, the others."""

    validation: tuple[int, ...]
    reported: tuple[int, ...]


def split_forget(records: int, seed: int) -> Split:
    """Draws half of the forget records to decide on.

    Raises:
        DataError: there are fewer than four.
    """
    if records < FEWEST:
        raise DataError(
            f"forget_target decides on one half of the forget set and reports the other; the forget set has {records} "
            f"records, and at least {FEWEST} are needed. Leave forget_target out, or add records"
        )
    drawn = set(random.Random(f"{seed} validation").sample(range(records), records // 2))
    return Split(tuple(sorted(drawn)), tuple(index for index in range(records) if index not in drawn))


def unanswered(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], max_length: int | None = None
) -> float:
    """Share of the records whose question is not answered (recall below 0.5), nor its rewording where it has one."""
    asked = [
        (number, replace(record, prompt=prompt))
        for number, record in enumerate(records)
        for prompt in (record.prompt, record.paraphrased_prompt)
        if prompt is not None
    ]
    questions = [record for _, record in asked]
    answers = greedy_answers(model, tokenizer, questions, max_length=max_length, progress=False)
    recalls = rouge_recall([record.completion for _, record in asked], answers)
    answered = {number for (number, _), recall in zip(asked, recalls, strict=True) if recall >= ANSWERED}
    return 1.0 - len(answered) / len(records)


def shrink_update(
    sparse: Sparse,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    target: float,
    max_length: int | None = None,
) -> tuple[float, float]:
    """Shrinks the update as far as that share of the records stays unanswered.

    Returns:
        How much of the update is kept, and the share that is unanswered then; it is below the target where even the
        whole update does not reach it.
    """
    try:
        # Shares of n records are multiples of 1 / n: the tolerance is for rounding alone.
        share = shrink(sparse, lambda: unanswered(model, tokenizer, records, max_length) >= target - 1e-9)
        return share, unanswered(model, tokenizer, records, max_length)
    except BaseException:
        sparse.revert()
        sparse.restore()
        raise


def teaches_answers(objective: Objective, stages: Sequence[Stage] | None) -> bool:
    """Returns whether answers are learned in place of the forgotten ones, which a smaller update would take back."""
    objectives = [objective] if stages is None else [get_objective(stage.objective) for stage in stages]
    return any("alternate" in one.forget_batches for one in objectives)


@contextmanager
@torch.no_grad()
def holding(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with these weights, by name, in place of its own, which come back bit by bit."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].detach().clone() for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].copy_(weight)
        yield
    finally:
        for name, weight in own.items():
            parameters[name].copy_(weight)
