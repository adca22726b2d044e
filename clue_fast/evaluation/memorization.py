"""Metrics of what is still answered, and of how likely right and wrong answers are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clue_fast.evaluation.answers import answered
from clue_fast.evaluation.likelihood import mean_truth_ratio, option_probability
from clue_fast.evaluation.metrics import Metrics, mean
from clue_fast.evaluation.registry import metric


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
    """ROUGE-L recall of the greedy answers, mean over the records.

    Lin 2004; with the settings of TOFU (arXiv 2401.06121).
    """
    return mean(metrics.rouge_recalls)


@metric("next-token accuracy", better="higher", better_forgotten="lower", name="accuracy")
def _accuracy(metrics: Metrics) -> float:
    """Share of the tokens of the right answer, its end included, that are the first choice under teacher forcing.

    Known as memorization accuracy (Tirumala et al. 2022, arXiv 2205.10770) and exact memorization (open-unlearning,
    which leaves the end out).
    """
    return mean(metrics.accuracies)


@metric("answer probability", better="higher", better_forgotten="lower", name="probability")
def _probability(metrics: Metrics) -> float:
    """exp(-loss) of each answer, mean over the records.

    P(answer | question)^(1 / tokens), TOFU (arXiv 2401.06121).
    """
    return mean([math.exp(-loss) for loss in metrics.losses])


@metric("answer loss", better="lower", better_forgotten="higher", name="loss")
def _loss(metrics: Metrics) -> float:
    """Teacher-forced loss per token of the right answer, in nats, mean over the records."""
    return mean(metrics.losses)


@metric(
    "truth ratio{averaged}", better="higher", better_forgotten="higher", name="truth_ratio", needs=["wrong answers"]
)
def _truth_ratio(metrics: Metrics) -> float:
    """Truth ratios R, mean of min(R, 1/R) over records to be forgotten, of max(0, 1-R) over others.

    TOFU (arXiv 2401.06121); see ``mean_truth_ratio``.
    """
    return mean_truth_ratio(metrics.truth_ratios, bool(metrics.forgotten))


@metric(
    "probability among options",
    better="higher",
    better_forgotten="lower",
    name="option_probability",
    needs=["wrong answers"],
    default=False,
)
def _option_probability(metrics: Metrics) -> Sequence[float]:
    """Probability of the right answer among itself and the wrong ones, mean over the records.

    TOFU (arXiv 2401.06121), for real authors and world facts; see ``option_probability``.
    """
    pairs = zip(metrics.losses, metrics.perturbed_losses, strict=True)
    return [option_probability(loss, others) for loss, others in pairs]
