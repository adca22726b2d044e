"""Whether records can be told to have been in the training data, and how much more so than of a retrained model.

An attack gives every record a score, the higher the likelier it was trained on, from what the model thinks of its
answer. How good it is says the area under its ROC curve, of the forget set against records that no model was trained on
(the set ``unseen``): .5 where the two cannot be told apart, 1 where every forgotten record stands out. A value far
below .5 gives the records away too: they are unlikelier than what was never seen.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from clue_fast.errors import DataError
from clue_fast.evaluation.metrics import Metrics, mean
from clue_fast.evaluation.registry import UNSEEN, Skipped, metric

MIN_K = 0.4
"""The share of the tokens that MUSE and open-unlearning look at; min-k proposed .2."""


def area_under_curve(members: Sequence[float], others: Sequence[float]) -> float:
    """The share of pairs in which a member's score is above another's, ties by half: the area under the ROC curve.

    From the sum of ranks (Mann and Whitney 1947).

    Raises:
        DataError: one of the two is empty.
    """
    if not len(members) or not len(others):
        raise DataError("a membership attack compares the scores of two sets, and one of them has none")
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([np.asarray(members, float), np.asarray(others, float)]))
    count = len(members)
    return float((math.fsum(ranks[:count]) - count * (count + 1) / 2) / (count * len(others)))


def zlib_score(loss: float, text: str) -> float:
    """-loss / (bytes of the compressed text): a loss that is low for how much there is to say.

    Carlini et al. 2021 (arXiv 2012.07805).
    """
    return -loss / len(zlib.compress(text.encode("utf-8")))


def min_k_score(log_probs: Sequence[float], k: float = MIN_K) -> float:
    """Mean of the lowest share k of the values of the tokens, of one at least.

    Of log-probabilities it is Min-K% Prob, Shi et al. 2024 (arXiv 2310.16789); of those normalized by mean and standard
    deviation over the vocabulary Min-K%++, Zhang et al. 2025 (arXiv 2404.02936).
    """
    return mean(sorted(log_probs)[: max(1, int(len(log_probs) * k))])


def privacy_leakage(auc: float, retrained_auc: float) -> float:
    """How far an attack's area under the curve is from that of a retrained model, in percent of the latter.

    PrivLeak of MUSE, Shi et al. 2024 (arXiv 2407.06460): (A - A_retrained) / A_retrained * 100 with A = 1 - area, since
    its authors take the area of the members' losses. 0 is the aim; below 0, down to -100, too little is forgotten, and
    above 0 too much, so that the records stand out again.

    Args:
        auc: area under the curve of the model, 1 where members are the likeliest.
        retrained_auc: of a model that was trained without the forget set.
    """
    return ((1.0 - auc) - (1.0 - retrained_auc)) / max(1.0 - retrained_auc, 1e-10) * 100.0


def _attacked(metrics: Metrics, score: Callable[[Metrics, int], float]) -> float:
    """Area under the curve of a score of a record of a set."""
    beside = metrics.beside
    assert beside is not None  # NEEDS says so
    members, others = ([score(one, index) for index in range(one.count)] for one in (metrics, beside.sets[UNSEEN]))
    return area_under_curve(members, others)


_membership = partial(metric, better="near .5", better_forgotten="near .5", sets="forgotten", default=False)


def _min_k(metrics: Metrics) -> float:
    return _attacked(metrics, lambda one, i: min_k_score(one.scores[i].log_probs[: one.scores[i].length]))


@_membership("membership by loss", needs=["unseen"])
def membership_loss(metrics: Metrics) -> float:
    """Area under the ROC curve of -loss, forget set against unseen records.

    Yeom et al. 2018 (arXiv 1709.01604).
    """
    return _attacked(metrics, lambda one, index: -one.losses[index])


@_membership("membership by zlib", needs=["tokens", "unseen"])
def membership_zlib(metrics: Metrics) -> float:
    """Area under the ROC curve of -loss over the size of the compressed answer, forget set against unseen records.

    See ``zlib_score``.
    """
    return _attacked(metrics, lambda one, index: zlib_score(one.losses[index], one.records[index].completion))


@_membership("membership by min-k", needs=["tokens", "unseen"])
def membership_min_k(metrics: Metrics) -> float:
    """Area under the ROC curve of the mean of the 40 % lowest log-probabilities, forget set against unseen records.

    Without the end of the answer, as in open-unlearning; see ``min_k_score``.
    """
    return _min_k(metrics)


@_membership("membership by min-k++", needs=["vocabulary", "unseen"])
def membership_min_k_plus_plus(metrics: Metrics) -> float:
    """The same of log-probabilities normalized by their mean and standard deviation over the vocabulary.

    See ``min_k_score``.
    """
    return _attacked(metrics, lambda one, i: min_k_score(one.scores[i].normalized[: one.scores[i].length]))


@_membership("membership by reference", needs=["unseen", "retrained"])
def membership_reference(metrics: Metrics) -> float | Skipped:
    """Area under the ROC curve of the retrained model's loss minus the model's, forget set against unseen records.

    A reference tells what is easy to say from what is known; Carlini et al. 2021 (arXiv 2012.07805) and Ye et al. 2022
    (arXiv 2111.09679).
    """
    beside = metrics.beside
    assert beside is not None
    pairs = []
    for name, own in ((beside.name, metrics), (UNSEEN, beside.sets[UNSEEN])):
        reference = beside.retrained.get(name)
        if reference is None or len(reference.losses) != own.count:
            return Skipped(f"the retrained model has no losses of the records of the {name} set")
        pairs.append([other - loss for other, loss in zip(reference.losses, own.losses, strict=True)])
    return area_under_curve(*pairs)


@metric(
    "privacy leakage",
    better="near 0",
    better_forgotten="near 0",
    sets="forgotten",
    needs=["tokens", "unseen", "retrained"],
    default=False,
    name="privacy_leakage",
)
def _privacy_leakage(metrics: Metrics) -> float | Skipped:
    """How much min-k tells more (below 0) or less (above) than of the retrained model, in percent.

    PrivLeak of MUSE (arXiv 2407.06460), see ``privacy_leakage``.
    """
    beside = metrics.beside
    assert beside is not None
    retrained = beside.retrained[beside.name]
    known = retrained.value("membership_min_k")
    if known is None:
        if not retrained.scores or retrained.beside is None or UNSEEN not in retrained.beside.sets:
            return Skipped("the retrained model has no membership_min_k; evaluate it with this metric too")
        known = _min_k(retrained)
    return privacy_leakage(_min_k(metrics), known)
