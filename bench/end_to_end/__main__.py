"""Runs all arms in turns, prints their seconds and keeps them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench import machine
from bench.end_to_end.arms import work
from bench.end_to_end.runs import ARMS, FILE, FLOORS, OBJECTIVES, Run, Setting, table
from bench.files import RESULTS
from bench.interleaved import rounds_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=Path, default=Path(".benchmarks/models"), help="folder of the model, or for it"
    )
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{FILE}.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(steps=options.steps)
    if options.worker:
        work(options.worker, options.objectives[0], setting, options.models, options.scratch)
        return
    runs: dict[str, dict[str, Run]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for objective in options.objectives:
            runs[objective] = in_turns(options.arms, objective, setting, options.models, Path(scratch))
            print(table(objective, runs[objective], setting), flush=True)
    machine.use_all_cores()
    kept = {name: {arm: asdict(run) for arm, run in arms.items()} for name, arms in runs.items()}
    content = {"machine": machine.describe(), "setting": asdict(setting), "objectives": kept}
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def in_turns(arms: Sequence[str], objective: str, setting: Setting, models: Path, scratch: Path) -> dict[str, Run]:
    """Runs all arms, one part of one of them at a time."""
    workers = {}
    for arm in arms:
        command = [sys.executable, "-m", "bench.end_to_end", "--worker", arm, "--objectives", objective]
        command += ["--models", str(models), "--scratch", str(scratch), "--steps", str(setting.steps)]
        workers[arm] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    runs = {arm: Run() for arm in arms}

    def turn(arm: str) -> str:
        worker = workers[arm]
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise SystemExit(f"{arm} with {objective} ended with exit code {worker.wait()}")
        said = json.loads(line)
        runs[arm].parts.append((said["part"], said["seconds"]))
        runs[arm].peaks.append(said["peak"])
        return str(said["part"])

    for arm in arms:
        last = "load" if arm == "floor" else "prepare"
        while turn(arm) != last:
            pass
    orders = list(rounds_of(list(arms), len(arms)))
    most = max(map(setting.steps_of, arms))
    for number in range(most):
        for arm in orders[number % len(orders)]:
            if number >= most - setting.steps_of(arm):  # all end together
                for _ in FLOORS if arm == "floor" else ("step",):
                    turn(arm)
    for arm in arms:
        if arm != "floor":
            turn(arm)
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return runs


if __name__ == "__main__":
    main()
