"""What is left of a model beside what it forgot, and whether it forgot as a retrained one: the two axes of TOFU."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import harmonic_mean

from clue_fast.errors import DataError
from clue_fast.evaluation.likelihood import forget_quality, option_probability
from clue_fast.evaluation.metrics import Metrics, mean
from clue_fast.evaluation.registry import Skipped, metric

UTILITY = {"retain": False, "real_authors": True, "world_facts": True}
"""The sets that the model utility is of, and whether it takes the probability among options."""


def model_utility(values: Iterable[float]) -> float:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on retain set, real authors and world facts.

    TOFU, Maini et al. 2024 (arXiv 2401.06121): one of the nine that is near 0 brings all down. Of the retain set the
    probability is that of the answer, of the others that among options (``option_probability``), and truth ratios are
    means of max(0, 1-R), see ``mean_truth_ratio``.

    Args:
        values: the nine, in any order.

    Raises:
        DataError: there are none, or one is below 0.
    """
    found = list(values)
    if not found or min(found) < 0.0:
        raise DataError(f"a model utility is a harmonic mean of values from 0 on, not of {found}")
    return float(harmonic_mean(found))


@metric("model utility", better="higher", better_forgotten="higher", sets="kept", default=False, name="model_utility")
def _model_utility(metrics: Metrics) -> float | Skipped | None:
    """Harmonic mean of probability, ROUGE-L recall and truth ratio on retain set, real authors and world facts; in the
    row of the retain set.

    TOFU (arXiv 2401.06121), see ``model_utility``.
    """
    beside = metrics.beside
    if beside is None or beside.name != next(iter(UTILITY)):
        return None
    values = []
    for name, among_options in UTILITY.items():
        found = beside.sets.get(name)
        if found is None or not found.count:
            return Skipped(f'no set "{name}"')
        if found.truth_ratio is None:
            return Skipped(f"the set {name}: {found.skipped.get('truth_ratio', 'no truth ratio')}")
        pairs = zip(found.losses, found.perturbed_losses, strict=True)
        options = mean([option_probability(*pair) for pair in pairs]) if among_options else found.probability
        values += [options, found.rouge_recall, found.truth_ratio]
    return model_utility(values)


@metric(
    "forget quality (KS p)",
    better="higher",
    better_forgotten="higher",
    sets="forgotten",
    needs=["wrong answers", "retrained"],
    default=False,
    name="forget_quality",
)
def _forget_quality(metrics: Metrics) -> float | Skipped:
    """p-value of the two-sample Kolmogorov-Smirnov test of the R of the forget set against those of the retrained
    model.

    TOFU (arXiv 2401.06121), see ``forget_quality``.
    """
    beside = metrics.beside
    assert beside is not None  # NEEDS says so
    reference = beside.retrained[beside.name].truth_ratios
    if not reference:
        return Skipped("the retrained model has no truth ratios")
    return forget_quality(metrics.truth_ratios, reference)[0]
