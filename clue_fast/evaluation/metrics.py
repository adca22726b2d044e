"""What is measured of a model on each set of records, and the registry of metrics.

A metric is a function of ``Metrics``, what a model answered to the records of a set and how likely it found their
answers; ``metric`` registers it, and the table, the results and the documentation have it. One of one's own::

    from clue_fast.evaluation import metric

    @metric("exact answers", better="higher", better_forgotten="lower")
    def exact(metrics):
        '''Share of the records whose greedy answer is the right one, letter by letter.'''
        pairs = zip(metrics.answers, metrics.records, strict=True)
        return sum(answer == record.completion for answer, record in pairs) / metrics.count
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from clue_fast.data import EncodedRecords, Record, Source, check_encoding, encode_for, load_records, read_rows
from clue_fast.errors import DataError, NonFiniteError, SettingError, UnknownNameError
from clue_fast.evaluation.answers import (
    answer_questions,
    answered,
    check_references,
    make_questions,
    rouge_recall,
    sample_questions,
)
from clue_fast.evaluation.attacks import attack, attack_names
from clue_fast.evaluation.likelihood import mean_truth_ratio, score_examples, truth_ratios
from clue_fast.evaluation.relearning import relearn as relearn_records
from clue_fast.evaluation.relearning import relearned_records

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Metrics:
    """What a model knows of one set of records: means over the records, and their values in the order of the
    set.

    Attributes:
        count: number of records.
        loss: teacher-forced loss per token of the answer, its end included, in nats.
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
        attacks: what was still answered under attack, as ``Attacked.as_dict`` has it, by the name of the attack.
        further: metrics that were registered besides, by name.
        records: what was asked, in this process; it is not saved.
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
    attacks: dict[str, Any] = field(default_factory=dict, repr=False)
    further: dict[str, float] = field(default_factory=dict)
    records: Sequence[Record] = field(default=(), repr=False, compare=False)

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
        records: Sequence[Record] = (),
    ) -> Metrics:
        """All metrics of what was measured of each record; lists of what was not measured are empty."""
        nothing = math.nan
        return cls(
            len(losses),
            nothing,
            nothing,
            nothing,
            nothing,
            nothing,
            samples=samples,
            forgotten=forgotten,
            losses=losses,
            accuracies=accuracies,
            rouge_recalls=rouge_recalls,
            answers=answers,
            best_recalls=best_recalls,
            truth_ratios=truth_ratios,
            records=records,
        )._measured()

    def _measured(self) -> Metrics:
        """These with the value of every metric."""
        own = {one.name for one in fields(self)}
        values: dict[str, Any] = {name: one.of(self) for name, one in METRICS.items()}
        further = {name: value for name, value in values.items() if name not in own and value is not None}
        return replace(self, further=further, **{name: value for name, value in values.items() if name in own})

    def value(self, metric: str) -> float | None:
        """The value of a metric by its name; None where it was not measured."""
        value: float | None = self.further.get(metric) if metric not in _OWN else getattr(self, metric)
        return value

    def subset(self, indices: Sequence[int]) -> Metrics:
        """The figures of some of the records, without what was measured of the set as a whole, such as relearning.

        Raises:
            DataError: these figures hold no values by record.
        """
        if len(self.losses) != self.count:
            raise DataError("figures without the values of each record have none of a part of the set; evaluate again")
        lists = (self.losses, self.accuracies, self.rouge_recalls, self.answers, self.truth_ratios, self.best_recalls)
        parts: list[Any] = [[values[index] for index in indices] if values else [] for values in lists]
        records = [self.records[index] for index in indices] if self.records else []
        return Metrics.of(*parts, samples=self.samples, forgotten=self.forgotten, records=records)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the records, ready for JSON; further metrics stand among the others."""
        values = asdict(replace(self, records=()))
        further = values.pop("further")
        del values["records"]
        if not values["attacks"]:
            del values["attacks"]
        return {**values, **further}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> Metrics:
        """Reads what ``as_dict`` or ``summary`` gave."""
        own = {name: value for name, value in figures.items() if name in _OWN}
        return cls(**own, further={name: value for name, value in figures.items() if name not in _OWN})

    def summary(self) -> dict[str, Any]:
        """The values of the set only, ready for JSON."""
        return {name: value for name, value in self.as_dict().items() if not isinstance(value, list)}


_OWN = {one.name for one in fields(Metrics)} - {"further", "records"}

Measure: TypeAlias = "Callable[[Metrics], float | None]"

BETTER = ("higher", "lower")
SETS = ("all", "forgotten", "kept")


@dataclass(frozen=True)
class Metric:
    """A metric, and how it is read.

    Attributes:
        name: as results have it.
        title: in a table; ``{samples}``, ``{relearned}`` and ``{averaged}`` are filled in.
        function: from what was measured of the records of a set to a value, or None where that is not enough.
        better: "higher" or "lower", whichever is better on a set that is to be kept.
        better_forgotten: the same on a set that is to be forgotten.
        sets: of which sets it is: "all", "forgotten" or "kept".
    """

    name: str
    title: str
    function: Measure
    better: str
    better_forgotten: str
    sets: str

    def of(self, metrics: Metrics) -> float | None:
        """Its value on a set, or None if it is not for that set."""
        if self.sets != "all" and metrics.forgotten is not (self.sets == "forgotten"):
            return None
        return self.function(metrics)

    @property
    def description(self) -> str:
        """The first paragraph of the docstring."""
        return " ".join(inspect.getdoc(self.function).split("\n\n")[0].split())  # type: ignore[union-attr]


METRICS: dict[str, Metric] = {}
"""All registered metrics by name, in the order of the table."""


def metric(
    title: str, *, better: str, better_forgotten: str, sets: str = "all", name: str | None = None
) -> Callable[[Measure], Measure]:
    """Registers a function as a metric; its docstring says what it is.

    Args:
        title, better, better_forgotten, sets: see ``Metric``.
        name: in the results; default that of the function.

    Raises:
        UnknownNameError: there is no such direction, or no such sets.
        ValueError: the docstring is missing.
    """
    for what, value, choices in (
        ("direction", better, BETTER),
        ("direction", better_forgotten, BETTER),
        ("kind of set", sets, SETS),
    ):
        if value not in choices:
            raise UnknownNameError(what, value, choices)

    def register(function: Measure) -> Measure:
        if not inspect.getdoc(function):
            raise ValueError(f"metric {function.__name__}: its docstring should say what it is")
        own = name or function.__name__
        METRICS[own] = Metric(own, title, function, better, better_forgotten, sets)
        return function

    return register


@metric("questions answered", better="higher", better_forgotten="lower", name="answered")
def _answered(metrics: Metrics) -> float:
    """Share of the records whose greedy answer has a ROUGE-L recall of at least .5."""
    return answered(metrics.rouge_recalls)


@metric("answered, best of {samples}", better="higher", better_forgotten="lower", name="answered_in_samples")
def _answered_in_samples(metrics: Metrics) -> float | None:
    """Share of the records where at least one of the sampled answers has a ROUGE-L recall of at least .5."""
    return answered(metrics.best_recalls) if metrics.samples else None


@metric(
    "answered before relearning {relearned}",
    better="higher",
    better_forgotten="lower",
    name="answered_before_relearning",
)
def _answered_before_relearning(metrics: Metrics) -> float | None:
    """Share of the other records that is answered before a copy of the model learns some of the set again."""
    return metrics.answered_before_relearning


@metric(
    "answered after relearning {relearned}", better="higher", better_forgotten="lower", name="answered_after_relearning"
)
def _answered_after_relearning(metrics: Metrics) -> float | None:
    """Share of the other records that is answered after that."""
    return metrics.answered_after_relearning


@metric("ROUGE-L recall", better="higher", better_forgotten="lower", name="rouge_recall")
def _rouge_recall(metrics: Metrics) -> float:
    """ROUGE-L recall of the greedy answers, mean over the records."""
    return _mean(metrics.rouge_recalls)


@metric("next-token accuracy", better="higher", better_forgotten="lower", name="accuracy")
def _accuracy(metrics: Metrics) -> float:
    """Share of the tokens of the right answer, its end included, that are the first choice under teacher forcing."""
    return _mean(metrics.accuracies)


@metric("answer probability", better="higher", better_forgotten="lower", name="probability")
def _probability(metrics: Metrics) -> float:
    """exp(-loss) of each answer, mean over the records."""
    return _mean([math.exp(-loss) for loss in metrics.losses])


@metric("answer loss", better="lower", better_forgotten="higher", name="loss")
def _loss(metrics: Metrics) -> float:
    """Teacher-forced loss per token of the right answer, in nats, mean over the records."""
    return _mean(metrics.losses)


@metric("truth ratio{averaged}", better="higher", better_forgotten="higher", name="truth_ratio")
def _truth_ratio(metrics: Metrics) -> float | None:
    """Truth ratios R, mean of min(R, 1/R) over records to be forgotten, of max(0, 1-R) over others."""
    return mean_truth_ratio(metrics.truth_ratios, bool(metrics.forgotten)) if metrics.truth_ratios else None


def metric_title(metric: str, figures: Mapping[str, Any]) -> str:
    """How a table calls a metric of a set with these figures, as ``Metrics.summary`` has them."""
    averaged = {None: "", True: ", min(R, 1/R)", False: ", max(0, 1-R)"}[figures.get("forgotten")]
    return METRICS[metric].title.format_map({"samples": 0, "relearned": 0, **figures, "averaged": averaged})


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
    attacks: Iterable[str] | Mapping[str, Iterable[str]] = (),
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
        attacks: names of attacks, see ``clue_fast.evaluation.attack``, or which by set; examples in their prompts are
            records of the first set that is to be kept.
        seed: of all that is drawn.
        progress: shows bars for what takes longer than a second.

    Raises:
        NonFiniteError: the model's loss on a record is NaN or infinite.
        DataError: a record leaves nothing to ask or to measure.
        SettingError: samples is below 0, or relearn is, or leaves no record to ask.
    """
    drawn = samples if isinstance(samples, Mapping) else dict.fromkeys(sets, samples)
    relearned = relearn if isinstance(relearn, Mapping) else dict.fromkeys(sets, relearn)
    rows = {name: read_rows(source, name) for name, source in sets.items()}
    read = {name: load_records(own, name) if own else [] for name, own in rows.items()}
    check_evaluation(read, drawn, relearned)
    data = {name: _encoded(records, tokenizer, name) for name, records in read.items()}
    check_encoding(model, data, tokenizer, max_length)
    tried = {name: attack_names(attacks.get(name, ()) if isinstance(attacks, Mapping) else attacks) for name in data}
    kept = next((records for name, records in data.items() if name not in forgotten and records), None)
    common: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    asked: dict[str, Any] = {**common, "max_new_tokens": max_new_tokens, "max_length": max_length}
    results = {}
    for name, records in data.items():
        measured = _measure(
            model,
            tokenizer,
            records,
            name,
            forgotten=name in forgotten,
            samples=drawn.get(name, 0),
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            common=common,
        )
        if number := relearned.get(name, 0):
            dealt = _dealt_out(records, number, seed)
            relearning = relearn_records(model, tokenizer, *dealt, description=f"{name}: relearning", **asked)
            measured = replace(
                measured,
                relearned=number,
                answered_before_relearning=relearning.answered_before,
                answered_after_relearning=relearning.answered_after,
            )
        if tried[name]:
            found = attack(model, tokenizer, records, tried[name], examples=kept, seed=seed, **asked)
            measured = replace(measured, attacks={own: one.as_dict() for own, one in found.items()})
        results[name] = measured
    return results


def _encoded(records: list[Record], tokenizer: PreTrainedTokenizerBase, name: str) -> EncodedRecords:
    known = isinstance(records, EncodedRecords) and records.tokenizer is tokenizer
    return records if known else EncodedRecords(records, tokenizer, name)  # type: ignore[return-value]


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: EncodedRecords,
    name: str,
    *,
    forgotten: bool,
    samples: int,
    seed: int,
    max_new_tokens: int | None,
    max_length: int | None,
    common: dict[str, Any],
) -> Metrics:
    """Asks a model everything in one set; see ``evaluate``."""
    examples = encode_for(model, records, tokenizer, max_length)
    scores = score_examples(model, tokenizer, examples, description=f"{name}: scoring answers", **common)
    for number, score in enumerate(scores, start=1):
        if not math.isfinite(score.loss):
            raise NonFiniteError(
                f"the loss of record {number} of the {name} set is {score.loss}; look for NaN in the model's weights"
            )
    limits = {"max_new_tokens": max_new_tokens, "max_length": max_length}
    questions = make_questions(model, tokenizer, records.examples, **limits)
    answers = answer_questions(model, tokenizer, questions, description=f"{name}: answering", **common)
    ratios: list[float] = []
    if records and all(record.perturbed for record in records):
        ratios = truth_ratios(
            model,
            tokenizer,
            records,
            mean="geometric" if forgotten else "arithmetic",
            max_length=max_length,
            description=f"{name}: truth ratio",
            **common,
        )
    references = [record.completion for record in records]
    best: list[float] = []
    if samples:
        sampled = sample_questions(
            model, tokenizer, questions, samples, seed=seed, description=f"{name}: sampling answers", **common
        )
        pairs = zip(references, sampled, strict=True)
        best = [max(rouge_recall([reference] * samples, some)) for reference, some in pairs]
    return Metrics.of(
        [score.loss for score in scores],
        [score.accuracy for score in scores],
        rouge_recall(references, answers),
        answers,
        ratios,
        best,
        samples=samples,
        forgotten=forgotten,
        records=records,
    )


def _dealt_out(records: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """So many of the records, drawn by the seed, and the others."""
    drawn = relearned_records(len(records), count, seed)
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
