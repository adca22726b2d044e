"""Corrupted prompts: the same question about another subject, in as many tokens."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from clue_fast.criteria.circuit.attribution import CorruptedExample
from clue_fast.criteria.circuit.subjects import Span, Subjects, words_of
from clue_fast.data import IGNORED_LABEL, Record, encode
from clue_fast.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CORRUPTIONS = ("auto", "data", "subject", "answer")

LOOKED_AT = 64
"""Names of other records of which one that fits is looked for in each place."""

ATTEMPTS = 4
"""Names of other records that are tried, and then rows of several names."""

PART = 6
"""Most words of a part of a name."""

LENGTH = "corrupted_prompt of another length"
NO_SUBJECT = "no subject that other records replace"
NO_DONOR = "no other subject of as many tokens"
NO_ANSWER = "no other answer"


@dataclass
class CorruptedSet:
    """The clean and corrupted examples of a data set, and how they were made.

    Attributes:
        examples: of the records that have one, in their order.
        made: how many were made in each way: "data", "subject" or "answer".
        left_out: how many records have none, by reason.
        other_subject: how many corrupted prompts name the subject less often than the clean one.
    """

    examples: list[CorruptedExample] = field(default_factory=list)
    made: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    other_subject: int = 0

    @property
    def subject_differs(self) -> float | None:
        """The share of corrupted prompts about another subject; None where answers were replaced."""
        prompts = self.made["data"] + self.made["subject"]
        return self.other_subject / prompts if prompts else None

    def source(self) -> dict[str, Any]:
        """What a selection keeps of it, as JSON holds it."""
        return {"made": dict(self.made), "left_out": dict(self.left_out), "subject_differs": self.subject_differs}

    def __str__(self) -> str:
        ways = ", ".join(f"{count} from {way}" for way, count in self.made.items() if count)
        share = "" if self.subject_differs is None else f"; the subject differs in {self.subject_differs:.1%}"
        left_out = "".join(f"; {count} left out: {reason}" for reason, count in self.left_out.items())
        return f"{ways}{share}{left_out}"


def corrupt(
    sets: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    corruption: str = "auto",
    max_length: int | None = None,
) -> dict[str, CorruptedSet]:
    """Encodes the records of data sets, each with a corrupted example of as many tokens and the same answer.

    - ``data``: the prompt is the record's own ``corrupted_prompt``.
    - ``subject``: the subject of the prompt (see ``Subjects``) is replaced by that of another record, which no record
      names together with it. Preferred are subjects of the same data set, and among those the ones that stand in
      otherwise the same prompt, or behind the same word. Where no whole one has as many tokens, a part of a longer one
      is taken, or several names in a row.
    - ``answer``: the answer is that of another record, or several in a row, cut to the length; the labels remain.
    - ``auto``: ``data`` where a record has a corrupted prompt of as many tokens, else ``subject``.

    Nothing is filled up: a record for which there is no corrupted prompt of as many tokens is left out, which is
    counted and logged. The time is linear in the number of records.

    Args:
        sets: clean records, by the name of the data set.
        tokenizer: of the model.
        corruption: one of ``CORRUPTIONS``.
        max_length: longer examples are cut, in tokens.

    Raises:
        DataError: no record of a data set can be corrupted, or ``data`` is asked for and a record has none.
        UnknownNameError: no such corruption.
    """
    if corruption not in CORRUPTIONS:
        raise UnknownNameError("corruption", corruption, CORRUPTIONS)
    donors = None if corruption == "answer" else _Donors(sets, tokenizer)
    made = {}
    first = 0
    for name, records in sets.items():
        own = _Corruption(name, records, tokenizer, max_length)
        if donors is None:
            own.replace_answers()
        else:
            if corruption != "subject":
                own.take_prompts(required=corruption == "data")
            if corruption != "data":
                own.replace_subjects(donors, first)
            own.compare_subjects(donors.subjects.spans[first : first + len(records)])
        made[name] = own.finish()
        first += len(records)
    return made


class _Corruption:
    """Of one data set: what has been found of its records so far."""

    def __init__(
        self, name: str, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> None:
        self.name, self.records, self.tokenizer, self.max_length = name, records, tokenizer, max_length
        self.clean = encode(records, tokenizer, max_length, name)
        self.corrupted: dict[int, list[int]] = {}
        self.prompts: dict[int, str] = {}
        self.reasons: dict[int, str] = {}
        self.result = CorruptedSet()

    def take_prompts(self, *, required: bool) -> None:
        changed = {}
        for number, record in enumerate(self.records):
            if record.corrupted_prompt is not None:
                changed[number] = replace(record, prompt=record.corrupted_prompt)
                self.reasons[number] = LENGTH
            elif required:
                raise DataError(
                    f"record {number + 1} of the {self.name} set has no corrupted_prompt; add the column, or choose "
                    "the corruption 'subject'"
                )
        self._encode("data", changed)
        wrong = [str(number + 1) for number in changed if number not in self.corrupted]
        if wrong:
            logger.warning(
                "the corrupted_prompt of %d of %d records of the %s set equals the prompt or has another number of "
                "tokens, and is not used: record %s",
                len(wrong),
                len(self.records),
                self.name,
                ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else ""),
            )

    def replace_subjects(self, donors: _Donors, first: int) -> None:
        """Tries other subjects until one has as many tokens in the whole text.

        Args:
            donors: subjects of all data sets.
            first: number of this set's first record among those of all sets.
        """
        waiting: dict[int, dict[str, Iterator[str]]] = {}
        for number in range(len(self.records)):
            if number not in self.corrupted:
                spans = donors.subjects.spans[first + number]
                waiting[number] = {span.text: donors.candidates(span, first + number, self.name) for span in spans}
                self.reasons.setdefault(number, NO_DONOR if spans else NO_SUBJECT)
        chosen: dict[int, dict[str, str]] = defaultdict(dict)
        while waiting:
            changed = {}
            for number, candidates in waiting.items():
                following = {text: next(iterator, None) for text, iterator in candidates.items()}
                new = {text: other for text, other in following.items() if other is not None}
                chosen[number] |= new
                if new and len(chosen[number]) == len(candidates):
                    spans = donors.subjects.spans[first + number]
                    changed[number] = _with_subject(self.records[number], spans, chosen[number])
            self._encode("subject", changed)
            waiting = {number: waiting[number] for number in changed if number not in self.corrupted}

    def replace_answers(self) -> None:
        answers = [[label for label in example["labels"] if label != IGNORED_LABEL] for example in self.clean]
        distinct = {record.completion: answer for record, answer in zip(self.records, answers, strict=True)}
        texts = list(distinct)
        places = {text: place for place, text in enumerate(texts)}
        for number, (record, own) in enumerate(zip(self.records, answers, strict=True)):
            place = places[record.completion]
            body: list[int] = []
            for text in _following(texts, place):
                other = distinct[text]
                body += other[: len(other) - _shared_end(own, other)]
                if len(body) >= len(own):
                    break
            ids = list(self.clean[number]["input_ids"])
            where = [at for at, label in enumerate(self.clean[number]["labels"]) if label != IGNORED_LABEL]
            kept = _shared_end(own, distinct[texts[(place + 1) % len(texts)]])
            for at, token in zip(where[: len(where) - kept], body, strict=False):
                ids[at] = token
            if len(body) < len(own) - kept or not self._accept(number, ids, "answer"):
                self.reasons[number] = NO_ANSWER

    def compare_subjects(self, subjects: Sequence[Sequence[Span]]) -> None:
        """Counts the corrupted prompts that name their subject less often."""
        for number, prompt in self.prompts.items():
            words = frozenset[str]().union(*(span.words for span in subjects[number]))
            before, after = (
                sum(word.folded in words for word in words_of(text)) for text in (self.records[number].prompt, prompt)
            )
            self.result.other_subject += after < before

    def finish(self) -> CorruptedSet:
        for number, clean in enumerate(self.clean):
            if number in self.corrupted:
                example = CorruptedExample(clean["input_ids"], self.corrupted[number], clean["labels"])
                self.result.examples.append(example)
            else:
                self.result.left_out[self.reasons[number]] += 1
        logger.info("corrupted prompts of the %s set: %s", self.name, self.result)
        missing = sum(self.result.left_out.values())
        first = next((number for number in range(len(self.records)) if number not in self.corrupted), None)
        if first is None:
            return self.result
        what = f"record {first + 1} ({self.records[first].prompt[:60]!r}): {self.reasons[first]}"
        if not self.result.examples:
            raise DataError(
                f"no record of the {self.name} set can be corrupted, such as {what}; give the records a "
                "corrupted_prompt of as many tokens, or choose another corruption"
            )
        logger.warning(
            "%d of %d records of the %s set are left out of its circuit, such as %s",
            missing,
            len(self.records),
            self.name,
            what,
        )
        return self.result

    def _encode(self, way: str, changed: Mapping[int, Record]) -> None:
        """Takes the changed records in which the same answer has the same place."""
        examples = encode(list(changed.values()), self.tokenizer, name=self.name)
        for number, example in zip(changed, examples, strict=True):
            clean = self.clean[number]
            length = len(clean["input_ids"])
            whole = len(example["input_ids"]) == length or length == self.max_length
            same = whole and example["labels"][:length] == clean["labels"]
            if same and self._accept(number, example["input_ids"][:length], way):
                self.prompts[number] = changed[number].prompt

    def _accept(self, number: int, ids: list[int], way: str) -> bool:
        """Takes tokens that differ before the last one of the answer, behind which nothing is predicted."""
        clean = self.clean[number]
        last = max(at for at, label in enumerate(clean["labels"]) if label != IGNORED_LABEL)
        if ids[:last] == clean["input_ids"][:last]:
            return False
        self.corrupted[number] = ids
        self.result.made[way] += 1
        return True


class _Donors:
    """The subjects and names of all data sets, by where they stand and by their number of tokens."""

    def __init__(self, sets: Mapping[str, Sequence[Record]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.subjects = Subjects(record for records in sets.values() for record in records)
        texts: dict[str, None] = {}
        for spans in (*self.subjects.spans, *self.subjects.found):
            for span in spans:
                texts |= dict.fromkeys((span.text, *_parts(span.text)))
        encoded = tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"] if texts else []
        self._lengths = {text: len(ids) for text, ids in zip(texts, encoded, strict=True)}
        index: dict[tuple[object, ...], dict[str, None]] = defaultdict(dict)
        names = (name for name, records in sets.items() for _ in records)
        for name, spans, found in zip(names, self.subjects.spans, self.subjects.found, strict=True):
            for span in spans:
                length = self._lengths[span.text]
                for scope in (name, None):
                    for place in (span.frame, span.before, ""):
                        index[scope, place, span.number, length][span.text] = None
            for span in found:
                index["names", span.number, self._lengths[span.text]][span.text] = None
            for span in (*spans, *found):
                if not span.number:
                    for part in _parts(span.text):
                        index["parts", self._lengths[part]][part] = None
        self._index = {key: list(texts) for key, texts in index.items()}
        self._apart: dict[tuple[str, str], bool] = {}

    def candidates(self, span: Span, number: int, name: str) -> Iterator[str]:
        """What may stand in the place of a span of a record, the best first; at most twice ``ATTEMPTS``."""
        spans = self.subjects.spans[number]
        taken = frozenset[str]().union(*(own.words for own in spans))
        yield from islice(self._whole(span, spans, taken, number, name), ATTEMPTS)
        if not span.number:
            yield from self._in_a_row(span, spans, taken, number)

    def _whole(self, span: Span, spans: Sequence[Span], taken: frozenset[str], number: int, name: str) -> Iterator[str]:
        length = self._lengths[span.text]
        keys: list[tuple[object, ...]] = [
            (scope, place, span.number, length) for scope in (name, None) for place in (span.frame, span.before, "")
        ]
        keys.append(("names", span.number, length))
        if not span.number:
            keys.append(("parts", length))
        seen: set[str] = set()
        for key in keys:
            for text in self._from(key, number):
                if text not in seen and taken.isdisjoint(word.folded for word in words_of(text)):
                    seen.add(text)
                    if all(self._is_apart(own.text, text) for own in spans):
                        yield text

    def _in_a_row(self, span: Span, spans: Sequence[Span], taken: frozenset[str], number: int) -> Iterator[str]:
        """Several names in a row, the longest first, each of them once."""
        for attempt in range(ATTEMPTS):
            names: list[str] = []
            words = set(taken)
            missing = self._lengths[span.text]
            for length in range(missing, 0, -1):
                for text in self._from(("parts", length), number + attempt):
                    own = {word.folded for word in words_of(text)}
                    if length <= missing and words.isdisjoint(own) and all(self._is_apart(s.text, text) for s in spans):
                        names.append(text)
                        words |= own
                        missing -= length
            if missing == 0:
                yield " ".join(names)

    def _from(self, key: tuple[object, ...], number: int) -> Iterator[str]:
        """Some texts of one place, beginning elsewhere for each record, so that not all get the same."""
        texts = self._index.get(key, [])
        return (texts[(number + step) % len(texts)] for step in range(min(len(texts), LOOKED_AT)))

    def _is_apart(self, one: str, other: str) -> bool:
        """Whether no record has both names."""
        pair = (one, other)
        if pair not in self._apart:
            mentions = self.subjects.mentions
            self._apart[pair] = mentions.get(one, set()).isdisjoint(mentions.get(other, ()))
        return self._apart[pair]


def _parts(text: str) -> list[str]:
    """All runs of a few whole words of a name."""
    words = words_of(text)
    return [text[word.start : last.end] for first, word in enumerate(words) for last in words[first : first + PART]]


def _with_subject(record: Record, spans: Sequence[Span], others: Mapping[str, str]) -> Record:
    """A record about another subject, earlier turns included."""
    prompt = record.prompt
    for span in sorted(spans, key=lambda span: -span.start):
        prompt = prompt[: span.start] + others[span.text] + prompt[span.end :]
    named = re.compile("|".join(rf"(?<!\w){re.escape(text)}(?!\w)" for text in sorted(others, key=len, reverse=True)))
    history = tuple((role, named.sub(lambda match: others[match.group()], content)) for role, content in record.history)
    return replace(record, prompt=prompt, history=history)


def _following(texts: Sequence[str], place: int) -> Iterator[str]:
    """All other texts, from the next one on."""
    return (texts[(place + step) % len(texts)] for step in range(1, len(texts)))


def _shared_end(tokens: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both end with."""
    pairs = zip(reversed(tokens), reversed(other), strict=False)
    return next((count for count, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(other)))
