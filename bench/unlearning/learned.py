"""What a toy learns, each record in one place, and what it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clue_fast.data import Record

TUNED = 3
"""One in so many of the records to forget is for the choice of a learning rate; the others are reported."""

MEASURED = 40
"""Retain records that are asked."""

LATER = ("unseen", "instead", "asked")
"""Fields of ``Learned`` that do not count in its hash where they are empty."""


@dataclass(frozen=True)
class Learned:
    """Everything that a toy learns, and what it is asked beside.

    Attributes:
        forget: to forget.
        retain: to keep in training.
        tune: held out, to choose the learning rate.
        held_out: held out for the report.
        other: further sets that are held out and reported, by name.
        unseen: of the same knowledge as what is to be forgotten, records that no unlearning sees; the retrained model
            does not learn them either.
        instead: what the retrained model learns in their place.
        asked: further sets that are only asked, by name.
    """

    forget: Sequence[Record]
    retain: Sequence[Record]
    tune: Sequence[Record]
    held_out: Sequence[Record]
    other: Mapping[str, Sequence[Record]] = field(default_factory=dict)
    unseen: Sequence[Record] = ()
    instead: Sequence[Record] = ()
    asked: Mapping[str, Sequence[Record]] = field(default_factory=dict)

    @property
    def kept(self) -> list[Record]:
        """All that is not to be forgotten."""
        others = [record for records in self.other.values() for record in records]
        return [*self.retain, *self.tune, *self.held_out, *others]

    @property
    def everything(self) -> list[Record]:
        """What the model before it unlearns has learned."""
        return [*self.forget, *self.unseen, *self.kept]

    @property
    def without(self) -> list[Record]:
        """What the retrained model learns."""
        return [*self.kept, *self.instead]

    @property
    def reported(self) -> list[Record]:
        """Those of the records to forget that choose no learning rate."""
        return [record for index, record in enumerate(self.forget) if index % TUNED]

    def about(self) -> dict[str, Any]:
        """All records, ready for JSON."""
        return {name: value for name, value in asdict(self).items() if value or name not in LATER}

    def questions(self) -> dict[str, list[Record]]:
        """What a model is asked, by the name of the set; wrong answers only where their likelihood is reported."""
        plain = {"tune": self.tune, "held_out": self.held_out}
        further = {**({"unseen": self.unseen} if self.unseen else {}), **self.asked}
        return {
            "forget_tune": [replace(record, perturbed=()) for record in self.forget[::TUNED]],
            "forget": self.reported,
            "retain": list(self.retain[:MEASURED]),
            **{name: [replace(record, perturbed=()) for record in records] for name, records in plain.items()},
            **{name: list(records) for name, records in {**self.other, **further}.items()},
        }
