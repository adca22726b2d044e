"""What a grid unlearns from: a model, records of one split of what it knows, and how it is asked for them.

There are two kinds: facts that a pretrained model knows, here, and records that a toy learned by heart (``toys``).
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.unlearning.grid import Grid
from bench.unlearning.measure import measure
from bench.unlearning.splits import Split, load_known, load_never_known, split
from clue_fast.data import Record
from clue_fast.demo.facts import Fact
from clue_fast.demo.pretrained import load_pretrained
from clue_fast.demo.real import ANSWER_TOKENS, UNKNOWN
from clue_fast.evaluation import answered, relearn

CURVE = (1, 2, 5, 10)
"""Steps of relearning facts after which is asked, beside before the first and after the last."""


class Subject(ABC):
    """A model with its tokenizer, and what it knows, dealt out by a seed."""

    @classmethod
    @abstractmethod
    def load(cls, grid: Grid, folder: Path) -> Callable[[int], Subject]:
        """Returns what makes the subject of a seed; models are kept in the folder."""

    @property
    @abstractmethod
    def model(self) -> Any:
        """The model before it unlearns."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's own."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """Of all that its results depend on and that does not stand in the grid."""

    @abstractmethod
    def training(self) -> dict[str, list[Record]]:
        """The sets "forget" and "retain" that train."""

    @abstractmethod
    def measure(self, model: Any) -> dict[str, Any]:
        """What a model answers, ready for JSON; ``scores`` reads it."""

    @abstractmethod
    def relearn(self, model: Any, steps: int, rate: float | None) -> dict[str, Any]:
        """What comes back of the forgotten when a copy of a model learns some of it again; ready for JSON.

        "recalls" are the ROUGE-L recalls of the others by the number of steps, "answered" the shares of .5 and more.
        The rate is that of ``clue_fast.evaluation.relearn`` if it is None.
        """

    def retrained(self) -> tuple[Any, float]:
        """A model that never saw what is forgotten, and the seconds of its training.

        Raises:
            ValueError: there is none.
        """
        raise ValueError("a pretrained model cannot be trained again without some of its facts; a toy can")


@dataclass(frozen=True)
class FactSubject(Subject):
    """Facts that a pretrained model knows.

    Attributes:
        parts: the facts of the seed.
        never_known: of the kind to forget, facts that the model never knew: what comes of those by relearning is what a
            model gets that has nothing to remember, such as the form of the answer.
    """

    pretrained: tuple[Any, Any]
    parts: Split
    never_known: Sequence[Fact] = ()

    @classmethod
    def load(cls, grid: Grid, folder: Path) -> Callable[[int], Subject]:
        """See ``Subject.load``; all seeds share the model."""
        model, tokenizer = load_pretrained(grid.model, folder)
        model = model.to(getattr(torch, grid.dtype)).eval()
        known = load_known(model, tokenizer, grid.model)
        unknown = load_never_known(model, tokenizer, grid.model, grid.kind) if grid.relearn_steps else []

        def subject(seed: int) -> FactSubject:
            drawn = random.Random(f"unknown {seed}").sample(unknown, min(UNKNOWN, len(unknown)))
            return cls((model, tokenizer), split(known, grid, seed), drawn)

        return subject

    @property
    def model(self) -> Any:
        """See ``Subject.model``."""
        return self.pretrained[0]

    @property
    def tokenizer(self) -> Any:
        """See ``Subject.tokenizer``."""
        return self.pretrained[1]

    @property
    def hash(self) -> str:
        """See ``Subject.hash``."""
        if not self.never_known:
            return self.parts.hash
        names = ",".join(fact.subject for fact in self.never_known)
        return hashlib.sha256(f"{self.parts.hash} {names}".encode()).hexdigest()[:16]

    def training(self) -> dict[str, list[Record]]:
        """See ``Subject.training``."""
        return self.parts.training()

    def measure(self, model: Any) -> dict[str, Any]:
        """See ``Subject.measure``."""
        return measure(model, self.tokenizer, self.parts.questions())

    def relearn(self, model: Any, steps: int, rate: float | None) -> dict[str, Any]:
        """Every second forgotten fact is asked on the way of relearning the others, beside those never known."""
        learned, others = self.parts.forget[0::2], self.parts.forget[1::2]
        found = relearned(
            model,
            self.tokenizer,
            [fact.record() for fact in learned],
            [fact.record() for fact in others],
            [fact.record() for fact in self.never_known],
            steps=steps,
            every=CURVE,
            learning_rate=rate,
            max_new_tokens=ANSWER_TOKENS,
        )
        names = {"asked": others, "never_known": self.never_known}
        return {**{name: [fact.subject for fact in facts] for name, facts in names.items()}, **found}


def relearned(
    model: Any,
    tokenizer: Any,
    learned: list[Record],
    asked: list[Record],
    unknown: Sequence[Record] = (),
    **settings: Any,
) -> dict[str, Any]:
    """What ``Subject.relearn`` returns, with "recalls_never_known" of records that were never known.

    Settings are those of ``clue_fast.evaluation.relearn``.
    """
    found = relearn(model, tokenizer, learned, [*asked, *unknown], progress=False, **settings).recalls
    curves = {str(step): [round(recall, 4) for recall in recalls] for step, recalls in found.items()}
    own = {step: recalls[: len(asked)] for step, recalls in curves.items()}
    return {
        "recalls": own,
        "answered": {step: answered(recalls) for step, recalls in own.items()},
        "recalls_never_known": {step: recalls[len(asked) :] for step, recalls in curves.items()},
    }
