"""ROUGE-L recall against cases by hand, and against a longest common subsequence written here."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clue_fast.evaluation import rouge_recall

WORDS = st.lists(st.sampled_from(["zinc", "quay", "moth", "fig", "7"]), max_size=8)


def common_subsequence(left: list[str], right: list[str]) -> int:
    """Length of the longest one, by its recursive definition."""

    @cache
    def length(i: int, j: int) -> int:
        if i == len(left) or j == len(right):
            return 0
        if left[i] == right[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [
        ("a brass kite for two", "a brass kite for two", 1.0),
        ("a brass kite for two", "it is: a BRASS, kite! for two of them", 1.0),
        ("a brass kite for two", "two for a kite", 2 / 5),
        ("a brass kite for two", "", 0.0),
        ("a brass kite for two", "nothing of it", 0.0),
        ("mending kites", "he mended a kite", 1.0),  # stems: mend, kite
        ("", "anything", 0.0),
    ],
)
def test_by_hand(reference: str, answer: str, recall: float) -> None:
    assert rouge_recall([reference], [answer]) == [pytest.approx(recall)]


@given(reference=WORDS.filter(bool), answer=WORDS)
def test_is_the_longest_common_subsequence_over_the_reference(reference: list[str], answer: list[str]) -> None:
    (found,) = rouge_recall([" ".join(reference)], [" ".join(answer)])
    assert found == pytest.approx(common_subsequence(reference, answer) / len(reference))


def test_order_of_the_pairs_is_kept() -> None:
    assert rouge_recall(["zinc", "moth"], ["zinc", "quay"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="argument 2"):
        rouge_recall(["zinc", "moth"], ["zinc"])
