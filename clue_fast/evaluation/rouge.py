"""ROUGE-L recall: how much of the right answer an answer contains, in order, in any script."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

from clue_fast.errors import DataError

ANSWERED = 0.5
"""A question counts as answered from this ROUGE-L recall on."""

WITHOUT_SPACES = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TAI",
    "NEW TAI LUE",
    "AHOM",
    "BALINESE",
    "JAVANESE",
)
"""Scripts that put no space between words, as the names of their characters begin: Chinese and Japanese, and the
scripts of Southeast Asia that need a dictionary to be cut into words (UAX #14, class SA)."""

_ZERO_WIDTH_SPACE = "\u200b"


def words(text: str) -> list[str]:
    """The words that recall counts.

    A word is a run of letters, digits and combining marks of Unicode, with at least one letter or digit, compared
    without case and in compatibility form (NFKC, so that full-width digits, ligatures and decomposed accents are the
    same as others). What is written without spaces is cut into characters, each with the marks that follow it.
    Characters of format, such as joiners and soft hyphens, are left out.
    """
    runs = "".join(_kept(character) for character in unicodedata.normalize("NFC", text)).split()
    # Only now, so that symbols such as the trade mark sign are not taken for letters; a fraction falls into two words.
    folded = unicodedata.normalize("NFKC", " ".join(runs).casefold())
    runs = "".join(_kept(character) for character in folded).split()
    return [word for run in runs for word in _cut(run) if any(map(str.isalnum, word))]


def rouge_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each answer against its reference, in [0, 1].

    Longest common subsequence of ``words`` over their number in the reference (Lin 2004), by the library rouge-score
    with the settings of TOFU (arXiv 2401.06121): words in ASCII are stemmed. On ASCII text the value is that of
    rouge-score with its own words, runs of ASCII letters and digits; those end at every accent ("São" is "s" and "o")
    and do not exist in other alphabets. Where text is cut into characters, more of it is recalled by chance.

    Raises:
        ValueError: the lengths differ.
        DataError: a reference has no word.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_references(references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, answers, strict=True)
    return [float(scorer.score(reference, answer)["rougeL"].recall) for reference, answer in pairs]


def answered(recalls: Sequence[float]) -> float:
    """Share of the questions that are answered, by the recall of each; NaN without any."""
    return sum(recall >= ANSWERED for recall in recalls) / len(recalls) if recalls else math.nan


def check_references(references: Sequence[str], name: str | None = None) -> None:
    """Raises DataError naming the first right answer without a word, and the set it is from: it has no recall."""
    for number, reference in enumerate(references, start=1):
        if not words(reference):
            raise DataError(
                f"record {number}{f' of the {name} set' if name else ''}: its answer {reference[:40]!r} has no letter "
                "and no digit, so nothing of it can be recalled; change it or leave the record out"
            )


class _Words:
    """The tokenizer that rouge-score asks for: stems what its own would, and takes the rest as it is."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stemmed = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        tokens = [self._stemmed.tokenize(word) if word.isascii() else [word] for word in words(text)]
        return [token for tokens_of_word in tokens for token in tokens_of_word]


@lru_cache(maxsize=1 << 14)
def _kept(character: str) -> str:
    """The character, a space in place of a separator, or nothing for what is not seen."""
    category = unicodedata.category(character)
    if category[0] in "LMN":
        return "" if "VARIATION SELECTOR" in unicodedata.name(character, "") else character
    return "" if category == "Cf" and character != _ZERO_WIDTH_SPACE else " "


def _cut(run: str) -> Iterator[str]:
    """A run without separators as words, each character of a script without spaces a word of its own."""
    word, whole = "", False
    for character in run:
        if unicodedata.category(character)[0] == "M":
            word += character
            continue
        alone = _without_spaces(character)
        if word and (alone or whole):
            yield word
            word = ""
        word, whole = word + character, alone
    if word:
        yield word


@lru_cache(maxsize=1 << 14)
def _without_spaces(character: str) -> bool:
    return unicodedata.name(character, "").startswith(WITHOUT_SPACES)
