"""Which facts are forgotten, kept, held out to choose a learning rate, and held out for the report.

What a model knows is found out once and kept in a file (``bench/unlearning/known``): a fact at the edge is its first
choice or not by how bfloat16 rounds, and with one fact more or less every split would be another.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from bench.unlearning.grid import Grid
from clue_fast.data import Record
from clue_fast.demo.facts import FACTS, Fact, known_facts
from clue_fast.demo.real import never_known
from clue_fast.files import save_json

KNOWN = Path(__file__).parent / "known"

TRAINED = 2
"""Ways to ask for a fact that train; all others are only reported."""


@dataclass(frozen=True)
class Split:
    """The facts of a run, each in one place.

    Attributes:
        forget: to forget; they train in ``TRAINED`` ways.
        retain: to keep, of the same and of other kinds; they train in ``TRAINED`` ways.
        tune: held out, of the same and of other kinds; they choose the learning rate.
        held_out: held out for the report, of the same kind.
        other: held out for the report, of other kinds.
    """

    forget: Sequence[Fact]
    retain: Sequence[Fact]
    tune: Sequence[Fact]
    held_out: Sequence[Fact]
    other: Sequence[Fact]

    @property
    def hash(self) -> str:
        """Of all facts and where they stand."""
        facts = [[astuple(fact) for fact in getattr(self, name)] for name in self.__dataclass_fields__]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def training(self) -> dict[str, list[Record]]:
        """What trains."""
        return {"forget": _forms(self.forget, slice(TRAINED)), "retain": _forms(self.retain, slice(TRAINED))}

    def questions(self) -> dict[str, list[Record]]:
        """What the model is asked, by the name of the set."""
        return {
            "forget": _forms(self.forget, slice(TRAINED)),
            "reworded": _forms(self.forget, slice(TRAINED, None)),
            "reverse": [fact.reverse() for fact in self.forget],
            "tune": [fact.record() for fact in self.tune],
            "held_out": [fact.record() for fact in self.held_out],
            "other": [fact.record() for fact in self.other],
        }


def _forms(facts: Sequence[Fact], which: slice) -> list[Record]:
    """Some of the ways to ask for each fact that the answer completes."""
    ways = ([fact.record(), *(record for record in fact.rewordings() if record.verbatim)] for fact in facts)
    return [record for forms in ways for record in forms[which]]


def load_known(model: Any, tokenizer: Any, name: str, folder: Path = KNOWN) -> dict[str, list[Fact]]:
    """The facts that a model knows, by kind, of the file of that name, which is written if it is not there.

    Raises:
        ValueError: the file has a fact that is no longer in the list.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        known = {kind: known_facts(model, tokenizer, facts) for kind, facts in FACTS.items()}
        save_json(path, {kind: [fact.subject for fact in facts] for kind, facts in known.items()})
    subjects = json.loads(path.read_text(encoding="utf-8"))
    facts = {kind: {fact.subject: fact for fact in FACTS[kind]} for kind in subjects}
    for kind, named in subjects.items():
        for subject in named:
            if subject not in facts[kind]:
                raise ValueError(f"{path}: {subject} is no {kind} of the list any more; remove it, or the file")
    return {kind: [facts[kind][subject] for subject in named] for kind, named in subjects.items()}


def load_never_known(model: Any, tokenizer: Any, name: str, kind: str, folder: Path = KNOWN) -> list[Fact]:
    """Facts of a kind that a model never knew, see ``clue_fast.demo.real.never_known``; likewise of a file."""
    path = folder / f"{name}-never.json"
    subjects: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kind not in subjects:
        unknown = never_known(model, tokenizer, FACTS[kind])
        subjects[kind] = [fact.subject for fact in unknown]
        save_json(path, subjects)
    return [fact for fact in FACTS[kind] if fact.subject in subjects[kind]]


def split(known: Mapping[str, Sequence[Fact]], grid: Grid, seed: int) -> Split:
    """Deals the facts that a model knows out by a seed.

    Raises:
        ValueError: it knows too few of them.
    """
    draw = random.Random(f"split {seed}")
    same = draw.sample(list(known[grid.kind]), len(known[grid.kind]))
    others = [fact for kind, facts in known.items() if kind != grid.kind for fact in facts]
    others = draw.sample(others, len(others))
    needed = grid.forget + grid.retain + grid.tune
    if len(same) <= needed:
        raise ValueError(f"the model knows {len(same)} facts of the kind {grid.kind}; {needed + 1} are needed at least")
    first, second, third = grid.forget, grid.forget + grid.retain, needed
    kept, tuned = grid.other_retain, grid.other_retain + grid.other_tune
    return Split(
        forget=same[:first],
        retain=same[first:second] + others[:kept],
        tune=same[second:third] + others[kept:tuned],
        held_out=same[third : third + grid.held_out],
        other=others[tuned : tuned + grid.other_report],
    )
