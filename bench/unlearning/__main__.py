"""The command of the grids: ``run`` and ``table``, see the package."""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import os
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from bench import machine
from bench.files import RESULTS
from bench.unlearning.grid import Grid, Run
from bench.unlearning.kinds import kind_of
from bench.unlearning.methods import register_criteria, unlearn
from bench.unlearning.requests import requests_of, write_requests_table
from bench.unlearning.subjects import Subject
from bench.unlearning.tables import write_tables

ROOT = Path(__file__).parents[2]


def results_file(grid: Grid) -> Path:
    """Where the runs of a grid are kept."""
    return RESULTS / "unlearning" / f"{grid.name}.jsonl"


def load_runs(path: Path) -> list[dict[str, Any]]:
    """The runs of a file; a last line that was cut off by a kill is dropped, and its run is run again."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def append(path: Path, found: dict[str, Any]) -> None:
    """Appends one line, on disk when this returns; what a kill left of another is cut off first.

    Several processes may do so at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        if whole != end:
            file.truncate(whole)
        file.write(json.dumps(found).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def run_grid(grid: Grid, models: Path, seeds: Collection[int]) -> None:
    """Runs everything of those seeds that is not there yet."""
    transformers_logging.disable_progress_bar()
    subject_of = kind_of(grid).load(grid, models)
    path = results_file(grid)
    done = [run["key"] for run in load_runs(path)]
    for seed in [seed for seed in grid.seeds if seed in seeds]:
        subject, before = subject_of(seed), None
        for run in grid.runs():
            if run.seed != seed:
                continue
            key = {**run.key(grid), "facts": subject.hash}
            if key in done:
                continue
            before = before or subject.measure(subject.model)
            found = one_run(subject, run, grid)
            append(path, {"method": run.name, "key": key, "before": before, **found})
            done.append(key)
            print(f"{run.name} {run.budget:g} {run.rate:g} seed {seed}: {found['seconds']:.1f} s", flush=True)


def one_run(subject: Subject, run: Run, grid: Grid) -> dict[str, Any]:
    """Unlearns on a copy of the model, and says what it knows afterwards and what comes back.

    Of several requests it also says what the model knows after each ("on_the_way", without the last); the weights that
    trained are those of the request with most of them.
    """
    trained, seconds, peak, stages = 0, 0.0, None, list[dict[str, Any]]()
    if run.method.train == "retrained":
        model, seconds = subject.retrained()
        trained = model.num_parameters()
    else:
        model = copy.deepcopy(subject.model)
        reset_peak()
        for place, (part, steps, sets) in enumerate(requests_of(subject.training(), run, grid.steps)):
            if place:
                stages.append(subject.measure(model))
            started = time.perf_counter()
            trained = max(trained, unlearn(model, subject.tokenizer, sets, part, replace(grid, steps=steps)))
            seconds += time.perf_counter() - started
        peak = peak_bytes()
    found: dict[str, Any] = {"after": subject.measure(model)}
    if stages:
        found["on_the_way"] = stages
    if grid.relearn_steps:
        found["relearned"] = subject.relearn(model, grid.relearn_steps, grid.relearn_rate)
    return {**found, "trained": trained, "seconds": seconds, "peak_bytes": peak, "machine": machine.describe()}


def reset_peak() -> None:
    """Lets the peak of this process begin anew, where Linux does that."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int | None:
    """Most memory that this process had since ``reset_peak``, the model before training included; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.unlearning", description=__doc__)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("grid", type=Path, help="YAML file")
    parser.add_argument(
        "--models", type=Path, default=Path("pretrained"), help="folder of downloaded models and trained toys"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="only these, as one of several processes")
    options = parser.parse_args()
    grid = Grid.load(options.grid)
    register_criteria()
    if options.command == "run":
        run_grid(grid, options.models, options.seeds or grid.seeds)
    else:
        runs = load_runs(results_file(grid))
        print(write_tables(grid, runs, ROOT))
        print(write_requests_table(grid, runs, ROOT))


if __name__ == "__main__":
    main()
