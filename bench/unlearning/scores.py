"""What a run comes to: how much is forgotten and kept, and the score of both.

Two ways, one for each kind of subject. On facts of a pretrained model (``FACTS``) a run has the probabilities of short
answers:

- forgotten: the share of the answers' probability that is gone, 1 - Σ p_after / Σ p_before, of the forget facts. To
  tune: as the statements that trained; to report: in other words.
- kept: of each held-out fact min(1, p_after / p_before), averaged.

On records that a toy learned by heart (``TOYS``) it has whole sentences:

- forgotten: of the forget questions that greedy decoding answered before (ROUGE-L recall of .5), the share that it no
  longer answers. To tune: a third of them; to report: the others.
- kept: mean ROUGE-L recall on held-out records over that before, at most 1.

- beside (``KINDS``): of sets that are only reported, the share that is answered before and after.

The score is their harmonic mean. Behind it stands what comes back: *relearned* are the shares of the others that are
answered before and after steps of relearning (of facts 0, 1, 2, 5 and 10), *never known* those of facts that the model
did not know before either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, median
from typing import Any, TypeAlias

from clue_fast.evaluation import answered as share_answered

Found: TypeAlias = Mapping[str, Any]
"""One line of a file of results."""


@dataclass(frozen=True)
class Figures:
    """What one run came to, on one part of the records.

    Attributes:
        forgotten, kept: see the module.
    """

    forgotten: float
    kept: float

    @property
    def score(self) -> float:
        """Harmonic mean of what is forgotten and what is kept."""
        total = self.forgotten + self.kept
        return 2 * self.forgotten * self.kept / total if total > 0 else 0.0


@dataclass(frozen=True)
class Scoring:
    """How runs are scored, and what a table says of them.

    Attributes:
        tuned, reported: the set to forget and the set to keep by which a rate is chosen, and those of the report.
        forgotten, kept: of a run, on a set.
        columns: further columns by their titles, of the runs of a method.
        labels: of the axes of forgotten and kept.
    """

    tuned: tuple[str, str]
    reported: tuple[str, str]
    forgotten: Callable[[Found, str], float]
    kept: Callable[[Found, str], float]
    columns: Mapping[str, Callable[[Sequence[Found]], str]]
    labels: tuple[str, str]

    def figures(self, run: Found, sets: tuple[str, str]) -> Figures:
        """The figures of a run on a set to forget and one to keep."""
        forget, held_out = sets
        return Figures(self.forgotten(run, forget), self.kept(run, held_out))


def probability_gone(run: Found, name: str) -> float:
    """How much of the probability of the answers of a set is gone."""
    return max(0.0, 1 - sum(run["after"][name]["probability"]) / sum(run["before"][name]["probability"]))


def probability_kept(run: Found, name: str) -> float:
    """How much of the probability of the answers of a set is kept."""
    pairs = zip(run["before"][name]["probability"], run["after"][name]["probability"], strict=True)
    return mean(min(1.0, after / before) for before, after in pairs)


def answered(run: Found, name: str) -> float:
    """Share of the questions of a set that greedy decoding answers, of those that it answered before."""
    pairs = zip(run["before"][name]["answered"], run["after"][name]["answered"], strict=True)
    said = [after for before, after in pairs if before]
    return mean(said) if said else math.nan


def unanswered(run: Found, name: str) -> float:
    """Share that is no longer answered."""
    return 1 - answered(run, name)


def recall_kept(run: Found, name: str) -> float:
    """Mean recall over that before, at most 1; NaN if there was none before."""
    before, after = (mean(run[stage][name]["recall"]) for stage in ("before", "after"))
    return min(1.0, after / before) if before else math.nan


def _average(figure: Callable[[Found, str], float], name: str, digits: int = 2) -> Callable[[Sequence[Found]], str]:
    """Writes the mean of a figure over runs, those left out that have none."""

    def write(runs: Sequence[Found]) -> str:
        values = [value for run in runs if not math.isnan(value := figure(run, name))]
        return f"{mean(values):.{digits}f}" if values else "-"

    return write


def _shares(name: str) -> Callable[[Sequence[Found]], str]:
    """Writes which share of a set is answered before and after; what the model did not know before counts as well."""

    def write(runs: Sequence[Found]) -> str:
        if any(name not in run["after"] for run in runs):
            return "-"
        before, after = (mean(mean(run[stage][name]["answered"]) for run in runs) for stage in ("before", "after"))
        return f"{before:.2f} → {after:.2f}"

    return write


def _after(run: Found, name: str) -> float:
    value = run["after"][name]
    return math.nan if value is None else float(value)


def _mean_probability(run: Found, name: str) -> float:
    return mean(run["after"][name]["probability"])


def _perplexity_ratio(run: Found, name: str) -> float:
    return math.exp(run["after"][name] - run["before"][name])


def _forget_quality(runs: Sequence[Found]) -> str:
    return f"{median(run['after']['forget_quality'] for run in runs):.2g}"


def _relearned(runs: Sequence[Found]) -> str:
    """Shares of the others that are answered, step by step."""
    return _curve(runs, "recalls")


def _never_known(runs: Sequence[Found]) -> str:
    """The same of what was never known."""
    return _curve(runs, "recalls_never_known")


def _curve(runs: Sequence[Found], which: str) -> str:
    curves = [run["relearned"][which] for run in runs if which in run.get("relearned", {})]
    curves = [curve for curve in curves if curve["0"]]
    return " ".join(f"{mean(share_answered(c[step]) for c in curves):.2f}" for step in curves[0]) if curves else "-"


FACTS = Scoring(
    tuned=("forget", "tune"),
    reported=("reworded", "held_out"),
    forgotten=probability_gone,
    kept=probability_kept,
    columns={
        "kept, other kinds": _average(probability_kept, "other", 3),
        "answered: trained": _average(answered, "forget"),
        "reworded": _average(answered, "reworded"),
        "reverse": _average(answered, "reverse"),
        "held out": _average(answered, "held_out"),
        "text": _average(_perplexity_ratio, "text_loss", 3),
        "relearned": _relearned,
        "never known": _never_known,
    },
    labels=("forgotten, in other words", "kept of held-out facts"),
)

TOYS = Scoring(
    tuned=("forget_tune", "tune"),
    reported=("forget", "held_out"),
    forgotten=unanswered,
    kept=recall_kept,
    columns={
        "kept: retain": _average(recall_kept, "retain", 3),
        "probability": _average(_mean_probability, "forget", 3),
        "KS p": _forget_quality,
        "D": _average(_after, "distance"),
        "utility": _average(_after, "model_utility", 3),
        "relearned": _relearned,
    },
    labels=("forget questions no longer answered", "recall kept on held-out records"),
)

KINDS = replace(
    TOYS,
    columns={
        "kept: retain": _average(recall_kept, "retain", 3),
        "trained": _shares("forget"),
        "unseen": _shares("unseen"),
        "new": _shares("new"),
        "content": _shares("content"),
        "content, unseen": _shares("content_unseen"),
        "plain": _shares("plain"),
        "other rule, new": _shares("other_rule_new"),
    },
    labels=("records to forget no longer answered", "recall kept on held-out records"),
)
