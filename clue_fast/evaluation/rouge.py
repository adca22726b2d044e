"""ROUGE-L recall: how much of the right answer an answer contains, in order."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each answer against its reference, in [0, 1].

    Longest common subsequence of stemmed words over the number of words in the reference (Lin 2004), by the
    library rouge-score with the settings of TOFU (arXiv 2401.06121). Words are runs of ASCII letters and
    digits.

    Raises:
        ValueError: the lengths differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(references, answers, strict=True)
    return [float(scorer.score(reference, answer)["rougeL"].recall) for reference, answer in pairs]
