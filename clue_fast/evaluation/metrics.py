"""What is measured of a model on each set of records.

Before and after unlearning, beside a model that never saw the forget set.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from clue_fast.data import Record, Source, check_encoding, load_records, read_rows
from clue_fast.errors import DataError, NonFiniteError, SettingError
from clue_fast.evaluation.answers import answered, check_references, greedy_answers, rouge_recall, sampled_answers
from clue_fast.evaluation.likelihood import forget_quality, mean_truth_ratio, score_answers, truth_ratios
from clue_fast.evaluation.relearning import relearn as relearn_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        relearned: records of the set that a copy of the model learned again; 0 where none did.
        answered_before_relearning, answered_after_relearning: share of the other records that is answered before and
            after these were relearned, see ``relearn``; None where none were.
        truth_ratio: truth ratios over the set, see ``mean_truth_ratio``; None where the records have no wrong answers.
        forgotten: whether the set is to be forgotten, which decides how truth ratios are taken and averaged; None where
            that is not known.
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
    relearned: int = 0
    answered_before_relearning: float | None = None
    answered_after_relearning: float | None = None
    forgotten: bool | None = None
    losses: list[float] = field(default_factory=list, repr=False)
    accuracies: list[float] = field(default_factory=list, repr=False)
    rouge_recalls: list[float] = field(default_factory=list, repr=False)
    answers: list[str] = field(default_factory=list, repr=False)
    best_recalls: list[float] = field(default_factory=list, repr=False)
    truth_ratios: list[float] = field(default_factory=list, repr=False)

    @classmethod
    def of(
        cls,
        losses: list[float],
        accuracies: list[float],
        rouge_recalls: list[float],
        answers: list[str],
        truth_ratios: list[float],
        best_recalls: list[float],
        *,
        samples: int,
        forgotten: bool | None,
    ) -> Metrics:
        """The means of what was measured of each record; lists of what was not measured are empty."""
        return cls(
            count=len(losses),
            loss=_mean(losses),
            probability=_mean([math.exp(-loss) for loss in losses]),
            accuracy=_mean(accuracies),
            rouge_recall=_mean(rouge_recalls),
            answered=answered(rouge_recalls),
            truth_ratio=mean_truth_ratio(truth_ratios, bool(forgotten)) if truth_ratios else None,
            samples=samples,
            answered_in_samples=answered(best_recalls) if samples else None,
            forgotten=forgotten,
            losses=losses,
            accuracies=accuracies,
            rouge_recalls=rouge_recalls,
            answers=answers,
            best_recalls=best_recalls,
            truth_ratios=truth_ratios,
        )

    def subset(self, indices: Sequence[int]) -> Metrics:
        """The figures of some of the records, without what was measured of the set as a whole, such as relearning.

        Raises:
            DataError: these figures hold no values by record.
        """
        if len(self.losses) != self.count:
            raise DataError("figures without the values of each record have none of a part of the set; evaluate again")
        lists = (self.losses, self.accuracies, self.rouge_recalls, self.answers, self.truth_ratios, self.best_recalls)
        parts: list[Any] = [[values[index] for index in indices] if values else [] for values in lists]
        return Metrics.of(*parts, samples=self.samples, forgotten=self.forgotten)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def summary(self) -> dict[str, Any]:
        """The means only, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if not isinstance(value, list)}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Source],
    *,
    forgotten: Collection[str] = ("forget",),
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    samples: int | Mapping[str, int] = 0,
    relearn: int | Mapping[str, int] = 0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Metrics]:
    """Asks a model everything in each set and measures what it knows.

    The result does not depend on the batch size beyond rounding; model, tokenizer and torch's generator are left as
    they were found.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        sets: data sets by name, such as {"forget": ..., "retain": ..., "held_out": ...}, see ``load_records``; of a
            list without records nothing is measured.
        forgotten: names of the sets that are to be forgotten; see ``mean_truth_ratio``.
        batch_size: records a batch.
        max_new_tokens: longest greedy answer; None: that of the longest answer in the set.
        max_length: longest record, in tokens: what lies beyond is not scored, and answers end there. None: as many as
            the model has positions for.
        samples: answers to sample to each record, or how many by set, such as {"forget": 20}; see
            ``sampled_answers``. Each takes as long as a greedy answer.
        relearn: records of a set that a copy of the model learns again before it is asked the others, or how many by
            set; see ``clue_fast.evaluation.relearn``.
        seed: of the samples, and of which records are relearned.
        progress: shows bars for what takes longer than a second.

    Raises:
        NonFiniteError: the model's loss on a record is NaN or infinite.
        DataError: a record leaves nothing to ask or to measure.
        SettingError: samples is below 0, or relearn is, or leaves no record to ask.
    """
    drawn = samples if isinstance(samples, Mapping) else dict.fromkeys(sets, samples)
    relearned = relearn if isinstance(relearn, Mapping) else dict.fromkeys(sets, relearn)
    rows = {name: read_rows(source, name) for name, source in sets.items()}
    records_of = {name: load_records(own, name) if own else [] for name, own in rows.items()}
    check_evaluation(records_of, drawn, relearned)
    check_encoding(model, records_of, tokenizer, max_length)
    common: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    results = {}
    for name, records in records_of.items():
        scores = score_answers(
            model, tokenizer, records, max_length=max_length, description=f"{name}: scoring answers", **common
        )
        for number, score in enumerate(scores, start=1):
            if not math.isfinite(score.loss):
                raise NonFiniteError(
                    f"the loss of record {number} of the {name} set is {score.loss}; "
                    "look for NaN in the model's weights"
                )
        asked = {**common, "max_new_tokens": max_new_tokens, "max_length": max_length}
        answers = greedy_answers(model, tokenizer, records, description=f"{name}: answering", **asked)
        ratios: list[float] = []
        if records and all(record.perturbed for record in records):
            ratios = truth_ratios(
                model,
                tokenizer,
                records,
                mean="geometric" if name in forgotten else "arithmetic",
                max_length=max_length,
                description=f"{name}: truth ratio",
                **common,
            )
        references = [record.completion for record in records]
        best: list[float] = []
        if k := drawn.get(name, 0):
            sampled = sampled_answers(
                model, tokenizer, records, k, seed=seed, description=f"{name}: sampling answers", **asked
            )
            pairs = zip(references, sampled, strict=True)
            best = [max(rouge_recall([reference] * k, some)) for reference, some in pairs]
        results[name] = Metrics.of(
            [score.loss for score in scores],
            [score.accuracy for score in scores],
            rouge_recall(references, answers),
            answers,
            ratios,
            best,
            samples=k,
            forgotten=name in forgotten,
        )
        if number := relearned.get(name, 0):
            relearning = relearn_records(
                model,
                tokenizer,
                *_dealt_out(records, number, seed),
                description=f"{name}: relearning",
                **asked,
            )
            results[name] = replace(
                results[name],
                relearned=number,
                answered_before_relearning=relearning.answered_before,
                answered_after_relearning=relearning.answered_after,
            )
    return results


def _dealt_out(records: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """So many of the records, drawn by the seed, and the others."""
    drawn = set(random.Random(f"{seed} relearning").sample(range(len(records)), count))
    dealt: tuple[list[Record], list[Record]] = ([], [])
    for index, record in enumerate(records):
        dealt[index not in drawn].append(record)
    return dealt


def check_evaluation(
    sets: Mapping[str, Sequence[Record]], samples: Mapping[str, int], relearn: Mapping[str, int]
) -> None:
    """Raises what ``evaluate`` would, before any model is asked.

    Args:
        sets: as of ``evaluate``.
        samples, relearn: answers to sample and records to relearn, by set.

    Raises:
        DataError: an answer has no word.
        SettingError: so many answers cannot be sampled, or so many records relearned.
    """
    for name, number in samples.items():
        if number < 0:
            raise SettingError(f"samples {number} of the {name} set is below 0; 0 samples nothing")
    for name, number in relearn.items():
        if not 0 <= number < max(1, len(sets[name])):
            raise SettingError(
                f"relearn {number} leaves none of the {len(sets[name])} records of the {name} set to ask; choose fewer"
            )
    for name, records in sets.items():
        check_references([record.completion for record in records], name)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


COMPARED = {
    "answered": "questions answered",
    "answered_in_samples": "answered, best of {samples}",
    "answered_before_relearning": "answered before relearning {relearned}",
    "answered_after_relearning": "answered after relearning {relearned}",
    "rouge_recall": "ROUGE-L recall",
    "accuracy": "next-token accuracy",
    "probability": "answer probability",
    "loss": "answer loss",
    "truth_ratio": "truth ratio{averaged}",
}
"""Metrics in the order of the table, with their titles."""


def metric_title(metric: str, figures: Mapping[str, Any]) -> str:
    """How a table calls a metric of a set with these figures, as ``Metrics.summary`` has them."""
    averaged = {None: "", True: ", min(R, 1/R)", False: ", max(0, 1-R)"}[figures.get("forgotten")]
    return COMPARED[metric].format_map({"samples": 0, "relearned": 0, **figures, "averaged": averaged})


@dataclass(frozen=True)
class Row:
    """One metric on one set of records.

    Attributes:
        set, metric: as ``evaluate`` names them.
        title: of the metric, in a table.
        before, after: unlearning.
        reference: of a model that never saw the forget set; None where there is none.
        trained: after training and before the update was shrunk; None where it was not.
    """

    set: str
    metric: str
    title: str
    before: float
    after: float
    reference: float | None
    trained: float | None = None

    @property
    def kept(self) -> float | None:
        """After over before; None where before is 0."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class Comparison:
    """Every metric on every set, before and after.

    Attributes:
        rows: one a set and metric.
        forget_quality: (p, D) against the reference, by set to be forgotten and by stage ("before", "after" and, where
            the update was shrunk, "trained"); empty without truth ratios of both.
    """

    rows: tuple[Row, ...]
    forget_quality: dict[str, dict[str, tuple[float, float]]]

    def row(self, set: str, metric: str) -> Row:
        """The row of one set and metric, such as ("forget", "answered")."""
        for row in self.rows:
            if (row.set, row.metric) == (set, metric):
                return row
        raise KeyError((set, metric))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "rows": [{**asdict(row), "kept": row.kept} for row in self.rows],
            "forget_quality": {
                name: {stage: {"p": p, "statistic": statistic} for stage, (p, statistic) in stages.items()}
                for name, stages in self.forget_quality.items()
            },
        }

    def table(self) -> str:
        """The comparison as an aligned Markdown table."""
        columns = {"before": "before", "after": "after"}
        if any(row.trained is not None for row in self.rows):
            columns = {"before": "before", "trained": "after training", "after": "after shrinking"}
        if any(row.reference is not None for row in self.rows):
            columns["reference"] = "never saw it"
        header = ["set", "metric", *columns.values()]
        body = [
            [row.set.replace("_", " "), row.title, *(_number(getattr(row, stage)) for stage in columns)]
            for row in self.rows
        ]
        for name, stages in self.forget_quality.items():
            values = [f"{stages[stage][0]:.1e}" for stage in columns if stage != "reference"]
            body.append([name.replace("_", " "), "forget quality (KS p)", *values, "1"])
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        rule = ["-" * width if index < 2 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
        return "\n".join(_line(cells, widths) for cells in (header, rule, *body))


def compare(
    before: Mapping[str, Metrics],
    after: Mapping[str, Metrics],
    reference: Mapping[str, Metrics] | None = None,
    trained: Mapping[str, Metrics] | None = None,
) -> Comparison:
    """Puts two evaluations of the same sets side by side.

    Args:
        before: results of `evaluate` before unlearning.
        after: results of `evaluate` after it, on the same sets.
        reference: results of a model that never saw the forget set.
        trained: results after training, where the update was shrunk before ``after``.

    Raises:
        DataError: the evaluations are of different sets.
    """
    for stage, other in (("after", after), ("reference", reference), ("trained", trained)):
        if other is None:
            continue
        if {name: m.count for name, m in other.items()} != {name: m.count for name, m in before.items()}:
            raise DataError(
                f"the evaluations 'before' and {stage!r} are not of the same sets; evaluate both on the same"
            )
        for name, metrics in before.items():
            for count in ("samples", "relearned"):
                wanted, found = getattr(metrics, count), getattr(other[name], count)
                if wanted and found not in (0, wanted):
                    raise DataError(
                        f"of the {name} set, {count} is {wanted} 'before' and {found} in {stage!r}; measure both alike"
                    )
    rows = tuple(
        Row(
            name,
            metric,
            metric_title(metric, before[name].summary()),
            getattr(before[name], metric),
            getattr(after[name], metric),
            _of(reference, name, metric),
            _of(trained, name, metric),
        )
        for name in before
        for metric in COMPARED
        if getattr(before[name], metric) is not None and getattr(after[name], metric) is not None
    )
    quality = {}
    stages = {"before": before, "after": after} | ({} if trained is None else {"trained": trained})
    for name, known in ({} if reference is None else reference).items():
        ratios = {stage: figures[name].truth_ratios for stage, figures in stages.items()}
        forgotten = name == "forget" if known.forgotten is None else known.forgotten
        if forgotten and known.truth_ratios and all(ratios.values()):
            quality[name] = {stage: forget_quality(some, known.truth_ratios) for stage, some in ratios.items()}
    return Comparison(rows, quality)


def _of(evaluation: Mapping[str, Metrics] | None, name: str, metric: str) -> float | None:
    return None if evaluation is None else getattr(evaluation[name], metric)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "| " + " | ".join(padded) + " |"
