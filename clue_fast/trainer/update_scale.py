"""Scales an update down to what a target takes, decided on forget questions that the report can leave out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clue_fast.data import Record, encode
from clue_fast.deprecated import renamed_arguments
from clue_fast.errors import DataError
from clue_fast.evaluation.answers import ANSWERED, answer_questions, make_questions, rouge_recall
from clue_fast.objectives import Objective, get_objective
from clue_fast.sparse import Sparse
from clue_fast.trainer.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@renamed_arguments(enough="predicate")
@torch.no_grad()
def scale_update(sparse: Sparse, predicate: Callable[[], bool], steps: int = 5) -> float:
    """Scales the update down to the smallest share of it that still will do, found by bisection.

    The selected weights become original + scale * (trained - original). What was forgotten goes on being forgotten
    for a good part of the way back, while what was damaged on the way heals. A scale for a whole update, chosen by
    what the model then does, is the scaling coefficient of task vectors: Ilharco et al. 2023, "Editing Models with
    Task Arithmetic" (arXiv 2212.04089).

    Args:
        sparse: after training.
        predicate: whether the model, as it is at the moment, will do.
        steps: of the bisection; the scale is found to within 2 ** -steps.

    Returns:
        The scale of the update: 1 if nothing less will do, or not even the whole.
    """
    if not predicate():
        return 1.0
    slices = sparse.slices
    originals = [one.original.float() for one in slices]
    trained = [one.master().clone() for one in slices]

    def apply(scale: float) -> None:
        for one, before, after in zip(slices, originals, trained, strict=True):
            one.set_values(after if scale == 1.0 else torch.lerp(before, after, scale))

    too_little, scale = 0.0, 1.0
    for _ in range(steps):
        middle = (too_little + scale) / 2
        apply(middle)
        if predicate():
            scale = middle
        else:
            too_little = middle
    apply(scale)
    return scale


FEWEST = 4
"""Forget records below which a part to decide on and a part to report mean nothing."""

REPORTED = "forget_reported"
"""The set, in an evaluation, of the forget records that were not looked at."""


@dataclass(frozen=True)
class Split:
    """Indices of the forget records: ``validation``, on which the scale is decided, and ``reported``, the others."""

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


class Asked:
    """Forget questions and their rewordings, whose tokens are made once, to be asked again and again.

    Args:
        model: as it is asked.
        tokenizer: of the model.
        records: with their questions.
        max_length: most tokens of prompt and answer together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        max_length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.count = model, tokenizer, len(records)
        asked = [
            (number, replace(record, prompt=prompt))
            for number, record in enumerate(records)
            for prompt in (record.prompt, record.paraphrased_prompt)
            if prompt is not None
        ]
        self.numbers = [number for number, _ in asked]
        self.answers = [record.completion for _, record in asked]
        examples = encode([record for _, record in asked], tokenizer)
        self.questions = make_questions(model, tokenizer, examples, max_length=max_length)

    def unanswered(self) -> float:
        """Share of the records whose question is not answered (recall below 0.5), nor its rewording if it has one."""
        answers = answer_questions(self.model, self.tokenizer, self.questions, progress=False)
        recalls = rouge_recall(self.answers, answers)
        answered = {number for number, recall in zip(self.numbers, recalls, strict=True) if recall >= ANSWERED}
        return 1.0 - len(answered) / self.count


def scale_to_target(
    sparse: Sparse,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    target: float,
    max_length: int | None = None,
) -> tuple[float, float]:
    """Scales the update down as far as that share of the records stays unanswered.

    Returns:
        The scale of the update, and the share that is unanswered then; it is below the target where even the whole
        update does not reach it.
    """
    try:
        asked = Asked(model, tokenizer, records, max_length)
        # Shares of n records are multiples of 1 / n: the tolerance is for rounding alone.
        scale = scale_update(sparse, lambda: asked.unanswered() >= target - 1e-9)
        return scale, asked.unanswered()
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
