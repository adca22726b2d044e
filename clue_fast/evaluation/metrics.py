"""What is measured of a model on each set of records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from clue_fast.data import Record, check_encoding
from clue_fast.errors import NonFiniteError, SettingError
from clue_fast.evaluation.answers import greedy_answers, sampled_answers
from clue_fast.evaluation.rouge import check_references, rouge_recall
from clue_fast.evaluation.teacher_forcing import score_answers
from clue_fast.evaluation.truth import truth_ratios

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWERED = 0.5
"""A question counts as answered from this ROUGE-L recall on."""


@dataclass(frozen=True)
class Metrics:
    """What a model knows of one set of records: means over the records, and their values in the order of the
    set.

    Attributes:
        count: number of records.
        loss: teacher-forced loss a token of the answer, its end included, in nats.
        probability: exp(-loss) of each answer.
        accuracy: share of an answer's tokens that are the model's first choice under teacher forcing.
        rouge_recall: ROUGE-L recall of the greedy answers.
        answered: share of the records whose greedy answer has ROUGE-L recall >= 0.5.
        samples: answers sampled to each record; 0 where none were.
        answered_in_samples: share of the records where the best of these answers has ROUGE-L recall >= 0.5: what
            greedy decoding no longer says may still be there. None without samples.
        truth_ratio: likelihood of wrong answers over the right one; None where the records have no wrong
            answers.
    """

    count: int
    loss: float
    probability: float
    accuracy: float
    rouge_recall: float
    answered: float
    truth_ratio: float | None = None
    samples: int = 0
    answered_in_samples: float | None = None
    losses: list[float] = field(default_factory=list, repr=False)
    accuracies: list[float] = field(default_factory=list, repr=False)
    rouge_recalls: list[float] = field(default_factory=list, repr=False)
    answers: list[str] = field(default_factory=list, repr=False)
    best_recalls: list[float] = field(default_factory=list, repr=False)
    truth_ratios: list[float] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """The means only, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, list)}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Record]],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    samples: int | Mapping[str, int] = 0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Metrics]:
    """Asks a model everything in each set and measures what it knows.

    The result does not depend on the batch size beyond rounding; model, tokenizer and torch's generator are left as
    they were found.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        sets: records by name, such as {"forget": ..., "retain": ..., "held_out": ...}.
        batch_size: records a batch.
        max_new_tokens: longest greedy answer; None: that of the longest answer in the set.
        max_length: cuts examples under teacher forcing, in tokens; None: nothing is cut.
        samples: answers to sample to each record, or how many by set, such as {"forget": 20}; see
            ``sampled_answers``. Each takes as long as a greedy answer.
        seed: of the samples.
        progress: shows bars for what takes longer than a second.

    Raises:
        NonFiniteError: the model's loss on a record is NaN or infinite.
        DataError: a record leaves nothing to ask or to measure.
        SettingError: samples is below 0.
    """
    number_of = dict(samples) if isinstance(samples, Mapping) else dict.fromkeys(sets, samples)
    for name, number in number_of.items():
        if number < 0:
            raise SettingError(f"samples {number} of the {name} set is below 0; 0 samples nothing")
    for name, records in sets.items():
        check_references([record.completion for record in records], name)
    check_encoding(sets, tokenizer, max_length)
    results = {}
    for name, records in sets.items():
        scores = score_answers(
            model,
            tokenizer,
            records,
            batch_size=batch_size,
            max_length=max_length,
            progress=progress,
            description=f"{name}: scoring answers",
        )
        for number, score in enumerate(scores, start=1):
            if not math.isfinite(score.loss):
                raise NonFiniteError(
                    f"the loss of record {number} of the {name} set is {score.loss}; "
                    "look for NaN in the model's weights"
                )
        answers = greedy_answers(
            model,
            tokenizer,
            records,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            progress=progress,
            description=f"{name}: answering",
        )
        ratios: list[float] = []
        if records and all(record.perturbed for record in records):
            ratios = truth_ratios(
                model,
                tokenizer,
                records,
                batch_size=batch_size,
                max_length=max_length,
                progress=progress,
                description=f"{name}: truth ratio",
            )
        references = [record.completion for record in records]
        recalls = rouge_recall(references, answers)
        best: list[float] = []
        if drawn := number_of.get(name, 0):
            sampled = sampled_answers(
                model,
                tokenizer,
                records,
                drawn,
                seed=seed,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                progress=progress,
                description=f"{name}: sampling answers",
            )
            best = [
                max(rouge_recall([reference] * drawn, some))
                for reference, some in zip(references, sampled, strict=True)
            ]
        losses = [score.loss for score in scores]
        accuracies = [score.accuracy for score in scores]
        results[name] = Metrics(
            count=len(records),
            loss=_mean(losses),
            probability=_mean([math.exp(-loss) for loss in losses]),
            accuracy=_mean(accuracies),
            rouge_recall=_mean(recalls),
            answered=_mean([recall >= ANSWERED for recall in recalls]),
            truth_ratio=_mean(ratios) if ratios else None,
            samples=drawn,
            answered_in_samples=_mean([recall >= ANSWERED for recall in best]) if drawn else None,
            losses=losses,
            accuracies=accuracies,
            rouge_recalls=recalls,
            answers=answers,
            best_recalls=best,
            truth_ratios=ratios,
        )
    return results


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
