"""The embedded demo: a small Llama learns facts about invented people, then forgets a tenth of them."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clue_fast.data import Record
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_model, train_tokenizer
from clue_fast.evaluation import evaluate
from clue_fast.files import check_output
from clue_fast.unlearning import unlearn

logger = logging.getLogger(__name__)

PEOPLE = 60
FORGOTTEN = 6
HELD_OUT = 12
SAMPLES = 20
FRACTION = 0.3
"""Of the units. A small model that learned everything by heart holds it everywhere: with fewer of its units what was
forgotten comes back after a few steps of relearning, see ``bench/defaults.py``."""

ATTACKS = ("relearning", "rounding", "context", "prefix")


@dataclass(frozen=True)
class DemoData:
    """The records of the demo, by what is to become of them."""

    forget: list[Record]
    retain: list[Record]
    held_out: list[Record]

    @property
    def everything(self) -> list[Record]:
        """All records: what the model learns before it has to forget."""
        return self.forget + self.retain + self.held_out

    def save(self, folder: Path) -> None:
        """Writes one file of JSON lines a set, as the command line reads them."""
        for name in ("forget", "retain", "held_out"):
            write_jsonl(folder / f"{name}.jsonl", getattr(self, name))


def make_data(seed: int = 0) -> DemoData:
    """Invents the people of the demo and deals them out: a tenth to forget, a fifth held out, the rest to retain."""
    people = make_people(PEOPLE, seed)
    forget, held_out = people[:FORGOTTEN], people[FORGOTTEN : FORGOTTEN + HELD_OUT]
    return DemoData(records_of(forget), records_of(people[FORGOTTEN + HELD_OUT :]), records_of(held_out))


def write_jsonl(path: Path, records: Sequence[Record]) -> None:
    """Writes records as JSON lines with the columns question and answer."""
    rows = (json.dumps({"question": record.prompt, "answer": record.completion}) for record in records)
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def run_demo(output_dir: str | os.PathLike[str], *, seed: int = 0, progress: bool = True) -> str:
    """Trains, localizes, unlearns and evaluates; leaves a checkpoint, the data, the selection, results and plots.

    Args:
        output_dir: new or empty folder.
        seed: of the people and of everything else.
        progress: show progress bars.

    Returns:
        The table of results.

    Raises:
        OutputError: the folder is not empty.
    """
    started = time.perf_counter()
    check_output(output_dir)
    data = make_data(seed)
    tokenizer = train_tokenizer(data.everything)
    model = train_model(data.everything, tokenizer, seed=seed, progress=progress, description="learn everybody")
    retrained = train_model(
        data.retain + data.held_out, tokenizer, seed=seed, progress=progress, description="learn all but the forgotten"
    )
    sets = {"forget": data.forget, "retain": data.retain, "held_out": data.held_out}
    depth: dict[str, Any] = {"samples": {"forget": SAMPLES}, "attacks": {"forget": ATTACKS}}
    result = unlearn(
        model,
        tokenizer,
        forget=data.forget,
        retain=data.retain,
        held_out=data.held_out,
        retrained=evaluate(retrained, tokenizer, sets, **depth, seed=seed, progress=progress),
        output_dir=output_dir,
        fraction=FRACTION,
        evaluate_every=8,
        samples=SAMPLES,
        attacks=ATTACKS,
        seed=seed,
        progress=progress,
    )
    data.save(result.output_dir)
    logger.info("demo: %.1f s, everything is in %s", time.perf_counter() - started, output_dir)
    return result.table()
