"""What a question is about: the name that tells it from the others, found by comparing all questions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clue_fast.data import Record

_ALONE = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
"""Scripts without spaces."""

_WORD = re.compile(rf"\d+(?:[/.,:]\d+)*|[{_ALONE}]|[^\W\d_{_ALONE}]+(?:[-'\u2019.]?[^\W_{_ALONE}]+)*")
_SENTENCE_ENDS = ".!?:\n"
_QUOTES = " \t\"'\u201c\u201d\u2018\u2019\u00ab\u00bb(\u00bf\u00a1"
_LONGEST = 4
"""Words of a subject that no capital tells."""


class Word(NamedTuple):
    """A word of a text and where it stands; a possessive 's is not part of it."""

    text: str
    start: int
    end: int

    @property
    def folded(self) -> str:
        """It, whatever its case."""
        return self.text.casefold()


def words_of(text: str) -> list[Word]:
    """Words and numbers of a text; scripts without spaces are cut into characters."""
    words = []
    for match in _WORD.finditer(text):
        word = match.group()
        if word[-2:] in ("'s", "\u2019s"):
            word = word[:-2]
        words.append(Word(word, match.start(), match.start() + len(word)))
    return words


@dataclass(frozen=True)
class Span:
    """A name or number in a prompt.

    Attributes:
        text: it.
        start, end: where it stands.
        number: whether it is a number.
        before: the word in front of it, in lower case, or "".
        frame: stands for the prompt around it; equal where all the rest is.
    """

    text: str
    start: int
    end: int
    number: bool
    before: str
    frame: int

    @property
    def words(self) -> frozenset[str]:
        """Its words, whatever their case."""
        return frozenset(word.folded for word in words_of(self.text))


class Subjects:
    """Finds the subject of each of many records, in a time linear in their number.

    A name is a longest run of words that, inside sentences, are mostly written with a capital. Of several in a prompt,
    the subject is the one that is the only name of the most prompts; at a tie, the one that the most other prompts
    replace and otherwise agree. Where none is ever alone or replaced, the prompt describes its subject, and all its
    names and numbers are replaced together. Where a prompt has no name, as in a script without capitals, its subject
    is the shortest run of words that the most other prompts replace and otherwise agree.

    Args:
        records: of all data sets that are compared.

    Attributes:
        found: by record, all names and numbers of its prompt.
        spans: by record, those spans of its prompt that name the subject; none if nothing does.
        mentions: by name, the records whose prompt or completion has it.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        records = list(records)
        self._capitalized = _capitalized(records)
        self._alone = Counter[str]()
        self._frames = Counter[int]()
        self.mentions: dict[str, set[int]] = defaultdict(set)
        self.found = [self._find(record.prompt) for record in records]
        seen: set[str] = set()
        for number, (record, found) in enumerate(zip(records, self.found, strict=True)):
            names = [span for span in found if not span.number]
            for span in (*names, *self._find(record.completion)):
                self.mentions[span.text].add(number)
            if record.prompt in seen:
                continue
            seen.add(record.prompt)
            if len(texts := {span.text for span in names}) == 1:
                self._alone.update(texts)
            self._frames.update(span.frame for span in names or _word_runs(record.prompt))
        self.spans = [self._subject(record.prompt, own) for record, own in zip(records, self.found, strict=True)]

    def _find(self, text: str) -> list[Span]:
        """Names and numbers of a text."""
        found: list[Span] = []
        before, end_of_name = "", -1
        for word in words_of(text):
            is_name = word.text[0].isupper() and word.folded in self._capitalized
            if is_name and end_of_name >= 0 and text[end_of_name : word.start] in (" ", "-"):
                found[-1] = _span(text, found[-1].start, word.end, found[-1].before)
            elif is_name or word.text[0].isdigit():
                found.append(_span(text, word.start, word.end, before))
            end_of_name = word.end if is_name else -1
            before = word.folded
        return found

    def _subject(self, prompt: str, found: Sequence[Span]) -> list[Span]:
        names = [span for span in found if not span.number]
        if not names:
            runs = _word_runs(prompt)
            most = max((self._frames[span.frame] for span in runs), default=0)
            replaced = [span for span in runs if self._frames[span.frame] == most > 1]
            return [min(replaced, key=lambda span: span.end - span.start)] if replaced else []
        main = max(names, key=lambda span: (self._alone[span.text], self._frames[span.frame], -span.start))
        if self._alone[main.text] == 0 and self._frames[main.frame] < 2:
            return list(found)
        return [span for span in names if span.words & main.words]


def _capitalized(records: Iterable[Record]) -> set[str]:
    """Words that, inside sentences, are written with a capital more often than without, in lower case."""
    capital, small = Counter[str](), Counter[str]()
    for record in records:
        for text in (record.prompt, record.completion):
            for word in words_of(text):
                if not word.text[0].isupper():
                    small[word.folded] += 1
                elif not _begins_sentence(text, word.start):
                    capital[word.folded] += 1
    return {word for word, count in capital.items() if count > small[word]}


def _word_runs(prompt: str) -> list[Span]:
    """Every run of a few words."""
    words = words_of(prompt)
    return [
        _span(prompt, word.start, last.end, words[first - 1].folded if first else "")
        for first, word in enumerate(words)
        for last in words[first : first + _LONGEST]
    ]


def _span(text: str, start: int, end: int, before: str) -> Span:
    own = text[start:end]
    return Span(own, start, end, own[0].isdigit(), before, hash((text[:start], text[end:])))


def _begins_sentence(text: str, position: int) -> bool:
    before = text[:position].rstrip(_QUOTES)
    return not before or before[-1] in _SENTENCE_ENDS
