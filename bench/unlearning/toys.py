"""Small models that learned all they know by heart, from nothing, and the same without what is to be forgotten.

``tofu-small`` learns fictitious authors of TOFU (Maini et al. 2024, arXiv 2401.06121), the ten shortest answers of
each, beside real authors and world facts, which are the other kinds of its knowledge. The authors to forget are of
forget05, all others of those retain authors to whose questions there are wrong answers too. Both models of a seed are
trained when it is first asked for, and kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.files import DATA
from bench.unlearning.grid import Grid
from bench.unlearning.scores import TOYS as SCORING
from bench.unlearning.scores import Scoring
from bench.unlearning.subjects import Subject, relearned
from clue_fast.data import Record, load_records
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.evaluation import Metrics, answered, evaluate, forget_quality
from clue_fast.evaluation.relearning import relearned_records
from clue_fast.files import output_folder, save_json

TUNED = 3
"""One in so many of the records to forget is for the choice of a learning rate; the others are reported."""

RELEARNED, CURVE, MEASURED = 6, (2, 5, 10), 40
"""Records that an attacker learns again, steps after which the others are asked, retain records that are asked."""

AUTHOR, QUESTIONS = 20, 10
"""Questions about each author, and how many of them, those with the shortest answers, are learned."""


@dataclass(frozen=True)
class Learned:
    """Everything that a toy learns, each record in one place.

    Attributes:
        forget: to forget.
        retain: to keep in training.
        tune: held out, to choose the learning rate.
        held_out: held out for the report.
        other: further sets that are held out and reported, by name.
    """

    forget: Sequence[Record]
    retain: Sequence[Record]
    tune: Sequence[Record]
    held_out: Sequence[Record]
    other: Mapping[str, Sequence[Record]] = field(default_factory=dict)

    @property
    def kept(self) -> list[Record]:
        """All that is not to be forgotten."""
        others = [record for records in self.other.values() for record in records]
        return [*self.retain, *self.tune, *self.held_out, *others]

    def questions(self) -> dict[str, list[Record]]:
        """What a model is asked, by the name of the set; wrong answers only where their likelihood is reported."""
        plain = {"tune": self.tune, "held_out": self.held_out}
        return {
            "forget_tune": [replace(record, perturbed=()) for record in self.forget[::TUNED]],
            "forget": [record for index, record in enumerate(self.forget) if index % TUNED],
            "retain": list(self.retain[:MEASURED]),
            **{name: [replace(record, perturbed=()) for record in records] for name, records in plain.items()},
            **{name: list(records) for name, records in self.other.items()},
        }


@dataclass(frozen=True)
class Toy:
    """A small model that learns by heart.

    Attributes:
        kinds: what it can forget; each deals out what it learns, by the numbers of a grid and a seed.
        shape, config: of the model and its training.
        vocabulary: most tokens.
    """

    kinds: Mapping[str, Callable[[Grid, int], Learned]]
    shape: Shape = field(default_factory=Shape)
    config: TrainConfig = field(default_factory=TrainConfig)
    vocabulary: int = 2048


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
    )
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

    scoring: ClassVar[Scoring] = SCORING

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
        about = [asdict(self.learned), asdict(self.toy.shape), asdict(self.toy.config), self.toy.vocabulary, self.seed]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]

    @cached_property
    def model(self) -> Any:
        """See ``Subject.model``; it learned everything."""
        return self._learn("everything", [*self.learned.forget, *self.learned.kept])[0]

    def retrained(self) -> tuple[Any, float]:
        """See ``Subject.retrained``."""
        return self._learn("retrained", self.learned.kept)

    @cached_property
    def tokenizer(self) -> Any:
        """See ``Subject.tokenizer``; both models of a seed share it."""
        folder = self.folder / self.hash / "tokenizer"
        if not folder.is_dir():
            tokenizer = train_tokenizer([*self.learned.forget, *self.learned.kept], self.toy.vocabulary)
            with output_folder(folder) as output:
                tokenizer.save_pretrained(output)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def training(self) -> dict[str, list[Record]]:
        """See ``Subject.training``."""
        return {"forget": list(self.learned.forget), "retain": list(self.learned.retain)}

    def measure(self, model: Any) -> dict[str, Any]:
        """Answers and probabilities by set; forget quality, and model utility where its sets are there, else None."""
        found = self._asked(model)
        kept = found["retain"].value("model_utility") if "retain" in found else None
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
        return evaluate(model, self.tokenizer, sets, batch_size=64, metrics=metrics, progress=False)

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
