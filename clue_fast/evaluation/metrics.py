"""What is known of a model's answers to a set of records, and every metric of it; see ``registry``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from clue_fast.data import Record
from clue_fast.errors import DataError
from clue_fast.evaluation.likelihood import AnswerScore
from clue_fast.evaluation.registry import METRICS, Skipped, metric_names


@dataclass(frozen=True)
class Beside:
    """What was measured besides a set: of other sets, and of a retrained model.

    Attributes:
        name: of the set.
        sets: all sets of the same model, by name.
        retrained: those of a model that was trained without the forget set.
    """

    name: str
    sets: Mapping[str, Metrics]
    retrained: Mapping[str, Metrics]


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
        perturbed_losses: losses a token of the wrong answers of each record.
        tokens: a hash of the tokens of the answers, which another tokenizer cuts otherwise.
        text: a text of windows that follow one another, and no records that can be asked.
        further: metrics that were registered besides, by name.
        values: of those that are means over the records, the value of each record.
        skipped: why a metric has no value, by its name.
        records: what was asked, in this process; it is not saved, and neither is what follows.
        scores: the tokens of each answer.
        prefixes: see ``clue_fast.evaluation.extraction.extracted_prefixes``.
        asked: names of the metrics that were asked for besides the default ones.
        beside: what else was measured.
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
    perturbed_losses: list[list[float]] = field(default_factory=list, repr=False)
    attacks: dict[str, Any] = field(default_factory=dict, repr=False)
    tokens: str | None = field(default=None, repr=False)
    text: bool = False
    further: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict, repr=False)
    skipped: dict[str, str] = field(default_factory=dict)
    records: Sequence[Record] = field(default=(), repr=False, compare=False)
    scores: Sequence[AnswerScore] = field(default=(), repr=False, compare=False)
    prefixes: Sequence[int] = field(default=(), repr=False, compare=False)
    asked: tuple[str, ...] = field(default=(), repr=False, compare=False)
    beside: Beside | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, scores: Sequence[AnswerScore], **measured: Any) -> Metrics:
        """All metrics of what was measured of each record, by the names of the attributes."""
        losses, accuracies = [score.loss for score in scores], [score.accuracy for score in scores]
        known: dict[str, Any] = {"losses": losses, "accuracies": accuracies, "scores": scores, **measured}
        return cls(len(losses), **_UNKNOWN, **known).measured()

    def measured(self, beside: Beside | None = None) -> Metrics:
        """These with the value of every metric, also of those that look at what was measured besides."""
        seen = replace(self, beside=beside)
        own = {one.name for one in fields(self)}
        found: dict[str, Any] = {name: METRICS[name].of(seen) for name in metric_names(self.asked)}
        skipped = {name: value.reason for name, value in found.items() if isinstance(value, Skipped)}
        values = {name: list(value) for name, value in found.items() if isinstance(value, Sequence)}
        found |= dict.fromkeys(skipped) | {name: mean(value) for name, value in values.items()}
        further = {name: value for name, value in found.items() if name not in own and value is not None}
        kept = {name: value for name, value in found.items() if name in own and not (self.text and value is None)}
        listed = {name: value for name, value in values.items() if name not in own}
        return replace(seen, further=further, skipped=skipped, values=listed, **kept)

    def value(self, metric: str) -> float | None:
        """The value of a metric by its name; None where it was not measured."""
        if metric in _OWN and self.text:
            return None
        value: float | None = self.further.get(metric) if metric not in _OWN else getattr(self, metric)
        return value

    def subset(self, indices: Sequence[int]) -> Metrics:
        """The figures of some of the records, without what was measured of the set as a whole, such as relearning.

        Raises:
            DataError: these figures hold no values by record.
        """
        if len(self.losses) != self.count:
            raise DataError("figures without the values of each record have none of a part of the set; evaluate again")
        parts: dict[str, Any] = {name: _some(getattr(self, name), indices) for name in _BY_RECORD}
        whole: dict[str, Any] = {name: getattr(self, name) for name in ("samples", "forgotten", "text", "asked")}
        return Metrics(len(indices), **_UNKNOWN, **parts, **whole).measured(self.beside)

    def as_dict(self) -> dict[str, Any]:
        """Everything that is saved, ready for JSON; further metrics stand among the others."""
        values = asdict(replace(self, **_UNSAVED))
        further = values.pop("further")
        empty = {"attacks": {}, "values": {}, "skipped": {}, "perturbed_losses": [], "text": False, "tokens": None}
        leave = {name for name, nothing in empty.items() if values[name] == nothing} | set(_UNSAVED)
        leave |= set(_UNKNOWN) if self.text else set()
        return {**{name: value for name, value in values.items() if name not in leave}, **further}

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> Metrics:
        """Reads what ``as_dict`` or ``summary`` gave."""
        own = {name: value for name, value in figures.items() if name in _OWN}
        unknown = _UNKNOWN if figures.get("text") else {}
        return cls(**unknown, **own, further={name: value for name, value in figures.items() if name not in _OWN})

    def summary(self) -> dict[str, Any]:
        """The values of the set only, and which metrics were skipped, ready for JSON."""
        own = {name: value for name, value in self.as_dict().items() if name != "values"}
        return {name: value for name, value in own.items() if not isinstance(value, list)}


_UNSAVED: dict[str, Any] = {"records": (), "scores": (), "prefixes": (), "asked": (), "beside": None}
_OWN = {one.name for one in fields(Metrics)} - {"further", *_UNSAVED}
_UNKNOWN: dict[str, Any] = dict.fromkeys(("loss", "probability", "accuracy", "rouge_recall", "answered"), math.nan)
"""What every set of records has, and a text has not."""

_BY_RECORD = (
    "losses",
    "accuracies",
    "rouge_recalls",
    "answers",
    "best_recalls",
    "truth_ratios",
    "perturbed_losses",
    "records",
    "scores",
    "prefixes",
)


def metric_title(metric: str, figures: Mapping[str, Any]) -> str:
    """How a table calls a metric of a set with these figures, as ``Metrics.summary`` has them."""
    averaged = {None: "", True: ", min(R, 1/R)", False: ", max(0, 1-R)"}[figures.get("forgotten")]
    return METRICS[metric].title.format_map({"samples": 0, "relearned": 0, **figures, "averaged": averaged})


def mean(values: Sequence[float]) -> float:
    """The mean, summed without rounding; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def _some(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
    return [values[index] for index in indices] if values else []
