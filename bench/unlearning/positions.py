"""Records of facts whose units are measured at the last token of the subject, not where the answer is predicted.

There, in the middle layers, a model looks up what it knows about the subject (Meng et al. 2022, "Locating and Editing
Factual Associations in GPT", arXiv 2202.05262).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from clue_fast.data import EncodedRecords, Record
from clue_fast.demo.facts import FACTS


def at_subjects(records: Sequence[Record], tokenizer: Any) -> EncodedRecords:
    """Records with their tokens, of which only the last one of the subject counts.

    Args:
        records: statements of facts, prompt and answer as they stand.
        tokenizer: a fast one.

    Raises:
        ValueError: a record is no statement of a fact that is known here, or the tokenizer has other tokens for it.
    """
    encoded = EncodedRecords(records, tokenizer)
    for record, example in zip(records, encoded.examples, strict=True):
        text = record.prompt + record.completion
        tokens = tokenizer(text, return_offsets_mapping=True)
        ids = example["input_ids"]
        if tokens["input_ids"][: len(ids)] != ids:
            raise ValueError(f"{text!r} has other tokens by itself than as a record; give a record without an end")
        subject = subject_of(record)
        last = record.prompt.rindex(subject) + len(subject) - 1
        place = max(i for i, (begin, end) in enumerate(tokens["offset_mapping"][: len(ids)]) if begin <= last < end)
        example["counted"] = [int(position == place) for position in range(len(ids))]
    return encoded


def subject_of(record: Record) -> str:
    """The subject of the fact that a record states. Raises ValueError if it states none."""
    if record.prompt not in _subjects():
        raise ValueError(f"{record.prompt!r} asks for no fact of clue_fast.demo.facts, so its subject is not known")
    return _subjects()[record.prompt]


@cache
def _subjects() -> Mapping[str, str]:
    """The subject of each prompt that there is."""
    facts = [fact for own in FACTS.values() for fact in own]
    return {form.prompt: fact.subject for fact in facts for form in (fact.record(), *fact.rewordings())}
