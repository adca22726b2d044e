"""Small models that learned all they know by heart, from nothing, and the same without what is to be forgotten.

``tofu-small`` learns fictitious authors of TOFU (Maini et al. 2024, arXiv 2401.06121), the ten shortest answers of
each, beside real authors and world facts, which are the other kinds of its knowledge. The authors to forget are of
forget05, all others of those retain authors to whose questions there are wrong answers too.

``kinds-small`` learns what is no list of facts: a style, a rule, a fact that stands in many records (``knowledge``).

Both models of a seed are trained when it is first asked for, and kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.files import DATA
from bench.unlearning.grid import Grid
from bench.unlearning.knowledge import rule, spread, style
from bench.unlearning.learned import Learned
from bench.unlearning.scores import KINDS, Scoring
from bench.unlearning.scores import TOYS as AUTHORS
from bench.unlearning.subjects import Subject, relearned
from clue_fast.data import Record, load_records
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.evaluation import Metrics, answered, evaluate, forget_quality
from clue_fast.evaluation.relearning import relearned_records
from clue_fast.files import output_folder, save_json

RELEARNED, CURVE = 6, (2, 5, 10)
"""Records that an attacker learns again, steps after which the others are asked."""

AUTHOR, QUESTIONS = 20, 10
"""Questions about each author, and how many of them, those with the shortest answers, are learned."""


@dataclass(frozen=True)
class Toy:
    """A small model that learns by heart.

    Attributes:
        kinds: what it can forget; each deals out what it learns, by the numbers of a grid and a seed.
        shape, config: of the model and its training.
        vocabulary: most tokens.
        answer_tokens: longest greedy answer; None for that of the longest answer of the set.
        scoring: what a table says of it.
    """

    kinds: Mapping[str, Callable[[Grid, int], Learned]]
    shape: Shape = field(default_factory=Shape)
    config: TrainConfig = field(default_factory=TrainConfig)
    vocabulary: int = 2048
    answer_tokens: int | None = None
    scoring: Scoring = AUTHORS


def tofu_authors(grid: Grid, seed: int) -> Learned:
    """Deals authors out; the numbers of a grid are of questions, ten to an author.

    Raises:
        ValueError: there are not as many authors, or other numbers of records.
    """
    draw = random.Random(f"toy {seed}")
    forget, retain = (_authors(name) for name in ("forget05_perturbed", "retain_perturbed"))
    real, world = (
        load_records(DATA / "tofu" / f"{name}_perturbed.json", name) for name in ("real_authors", "world_facts")
    )
    counts = (grid.forget, grid.retain, grid.tune, grid.held_out)
    if any(count % QUESTIONS for count in counts):
        raise ValueError(f"records of TOFU are dealt out by authors, in multiples of {QUESTIONS}, not {counts}")
    if grid.other_retain or grid.other_tune:
        raise ValueError("real authors and world facts are only reported; set other_retain and other_tune to 0")
    first, second, third = (sum(counts[1 : end + 1]) // QUESTIONS for end in (1, 2, 3))
    if grid.forget // QUESTIONS > len(forget) or third > len(retain):
        raise ValueError(
            f"{counts} questions are more than {len(forget)} authors to forget and {len(retain)} others have"
        )
    forget, retain = draw.sample(forget, grid.forget // QUESTIONS), draw.sample(retain, third)
    half = grid.other_report // 2
    return Learned(
        forget=_joined(forget),
        retain=_joined(retain[:first]),
        tune=_joined(retain[first:second]),
        held_out=_joined(retain[second:]),
        other={"real_authors": draw.sample(real, half), "world_facts": draw.sample(world, half)},
    )


def _authors(name: str) -> list[list[Record]]:
    """The shortest answers of each author of a file, in its order."""
    records = load_records(DATA / "tofu" / f"{name}.json", name)
    authors = (records[start : start + AUTHOR] for start in range(0, len(records), AUTHOR))
    shortest = ((author, sorted(author, key=lambda record: len(record.completion))[:QUESTIONS]) for author in authors)
    return [[record for record in author if record in kept] for author, kept in shortest]


def _joined(authors: Sequence[Sequence[Record]]) -> list[Record]:
    return [record for author in authors for record in author]


TOYS: dict[str, Toy] = {
    "tofu-small": Toy(
        kinds={"author": tofu_authors},
        shape=Shape(layers=5, width=128, units=384),
        config=TrainConfig(epochs=40, batch_size=16, lr=3e-3),
    ),
    "kinds-small": Toy(
        kinds={"style": style, "rule": rule, "spread": spread},
        shape=Shape(layers=3, width=64, units=192),
        config=TrainConfig(epochs=60, batch_size=16, lr=4e-3),
        vocabulary=1024,
        answer_tokens=16,
        scoring=KINDS,
    ),
}
"""By the name that a grid calls it."""


@dataclass
class ToySubject(Subject):
    """What a toy learned by heart with one seed.

    Attributes:
        toy: its shape and training.
        learned: what it learned.
        seed: of its training, and of what is learned again.
        folder: where its models are kept.
    """

    toy: Toy
    learned: Learned
    seed: int
    folder: Path

    @classmethod
    def load(cls, grid: Grid, folder: Path) -> Callable[[int], Subject]:
        """See ``Subject.load``. Raises ValueError if the toy knows nothing of the kind of the grid."""
        toy = TOYS[grid.model]
        if grid.kind not in toy.kinds:
            raise ValueError(f"{grid.model} can forget: {', '.join(toy.kinds)}; not {grid.kind!r}")
        return lambda seed: cls(toy, toy.kinds[grid.kind](grid, seed), seed, folder / grid.model)

    @cached_property
    def hash(self) -> str:
        """See ``Subject.hash``; of all records, of the shape and of the training."""
        about = [self.learned.about(), asdict(self.toy.shape), asdict(self.toy.config), self.toy.vocabulary, self.seed]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    @cached_property
    def model(self) -> Any:
        """See ``Subject.model``; it learned everything."""
        return self._learn("everything", self.learned.everything)[0]

    def retrained(self) -> tuple[Any, float]:
        """See ``Subject.retrained``."""
        return self._learn("retrained", self.learned.without)

    @cached_property
    def tokenizer(self) -> Any:
        """See ``Subject.tokenizer``; both models of a seed share it."""
        folder = self.folder / self.hash / "tokenizer"
        if not folder.is_dir():
            tokenizer = train_tokenizer(self.learned.everything, self.toy.vocabulary)
            with output_folder(folder) as output:
                tokenizer.save_pretrained(output)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def training(self) -> dict[str, list[Record]]:
        """See ``Subject.training``."""
        return {"forget": list(self.learned.forget), "retain": list(self.learned.retain)}

    def measure(self, model: Any) -> dict[str, Any]:
        """Answers and probabilities by set; forget quality and model utility, None where wrong answers are missing."""
        found = self._asked(model)
        kept = found["retain"].value("model_utility") if "retain" in found else None
        p, distance = None, None
        if found["forget"].truth_ratios:
            p, distance = forget_quality(found["forget"].truth_ratios, self._reference["forget"].truth_ratios)
        return {
            **{name: _by_record(metrics) for name, metrics in found.items()},
            "truth_ratios": [float(f"{ratio:.5g}") for ratio in found["forget"].truth_ratios],
            "forget_quality": p,
            "distance": distance,
            "model_utility": kept,
        }

    def relearn(self, model: Any, steps: int, rate: float | None) -> dict[str, Any]:
        """Six of the reported forget records are learned again, and the others asked on the way."""
        records = self.learned.questions()["forget"]
        drawn = relearned_records(len(records), RELEARNED, self.seed)
        learned = [record for index, record in enumerate(records) if index in drawn]
        asked = [record for index, record in enumerate(records) if index not in drawn]
        return relearned(
            model, self.tokenizer, learned, asked, steps=steps, every=CURVE, learning_rate=rate, batch_size=64
        )

    @cached_property
    def _reference(self) -> dict[str, Metrics]:
        """What the retrained model answers."""
        return self._asked(self.retrained()[0])

    def _asked(self, model: Any) -> dict[str, Metrics]:
        sets, metrics = self.learned.questions(), ("model_utility",)
        settings: dict[str, Any] = {"batch_size": 64, "max_new_tokens": self.toy.answer_tokens, "progress": False}
        return evaluate(model, self.tokenizer, sets, metrics=metrics, **settings)

    def _learn(self, name: str, records: Sequence[Record]) -> tuple[Any, float]:
        """A model that learned some records, and the seconds that it took, from the folder or anew."""
        folder = self.folder / self.hash / name
        if not folder.is_dir():
            started = time.perf_counter()
            trained = train_model(
                records,
                self.tokenizer,
                shape=self.toy.shape,
                config=self.toy.config,
                seed=self.seed,
                progress=False,
                description=f"seed {self.seed}, {name}",
            )
            with output_folder(folder) as output:
                trained.save_pretrained(output)
                save_json(output / "training.json", {"seconds": time.perf_counter() - started})
        model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        return model.eval(), json.loads((folder / "training.json").read_text(encoding="utf-8"))["seconds"]


def _by_record(metrics: Metrics) -> dict[str, list[float]]:
    """Whether each record is answered, its recall, and the probability a token of its answer."""
    return {
        "answered": [int(answered([recall])) for recall in metrics.rouge_recalls],
        "recall": [round(recall, 4) for recall in metrics.rouge_recalls],
        "probability": [float(f"{math.exp(-loss):.5g}") for loss in metrics.losses],
    }
