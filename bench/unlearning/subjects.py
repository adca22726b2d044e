"""What a grid unlearns from: a model, records of one split of what it knows, and how it is asked for them.

There are two kinds: facts that a pretrained model knows, here, and records that a toy learned by heart (``toys``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench.unlearning.grid import Grid
from bench.unlearning.measure import measure
from bench.unlearning.scores import FACTS, Scoring
from bench.unlearning.splits import Split, load_known, split
from clue_fast.data import Record
from clue_fast.demo.pretrained import load_pretrained
from clue_fast.evaluation import answered, relearn


class Subject(ABC):
    """A model with its tokenizer, and what it knows, dealt out by a seed.

    Attributes:
        scoring: how runs on it are scored.
    """

    scoring: ClassVar[Scoring]

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
        """What a model answers, ready for JSON; ``scoring`` reads it."""

    @abstractmethod
    def relearn(self, model: Any, steps: int) -> dict[str, Any]:
        """What comes back of the forgotten when a copy of a model learns some of it again; ready for JSON.

        "recalls" are the ROUGE-L recalls of the others by the number of steps, "answered" the shares of .5 and more.
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
    """

    pretrained: tuple[Any, Any]
    parts: Split

    scoring: ClassVar[Scoring] = FACTS

    @classmethod
    def load(cls, grid: Grid, folder: Path) -> Callable[[int], Subject]:
        """See ``Subject.load``; all seeds share the model."""
        model, tokenizer = load_pretrained(grid.model, folder)
        known = load_known(model := model.to(getattr(torch, grid.dtype)).eval(), tokenizer, grid.model)
        return lambda seed: cls((model, tokenizer), split(known, grid, seed))

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
        return self.parts.hash

    def training(self) -> dict[str, list[Record]]:
        """See ``Subject.training``."""
        return self.parts.training()

    def measure(self, model: Any) -> dict[str, Any]:
        """See ``Subject.measure``."""
        return measure(model, self.tokenizer, self.parts.questions())

    def relearn(self, model: Any, steps: int) -> dict[str, Any]:
        """Every second forgotten fact is asked after each step of relearning the others."""
        learned, asked = ([fact.record() for fact in self.parts.forget[start::2]] for start in (0, 1))
        return relearned(model, self.tokenizer, learned, asked, steps=steps, every=1)


def relearned(
    model: Any, tokenizer: Any, learned: list[Record], asked: list[Record], **settings: Any
) -> dict[str, Any]:
    """What ``Subject.relearn`` returns; settings are those of ``clue_fast.evaluation.relearn``."""
    found = relearn(model, tokenizer, learned, asked, progress=False, **settings).recalls
    return {
        "recalls": {str(step): [round(recall, 4) for recall in recalls] for step, recalls in found.items()},
        "answered": {str(step): answered(recalls) for step, recalls in found.items()},
    }
