"""Everything that needs a GPU, in one command of nine minutes at most, without network.

    make gpu-check                          with the Python that `PYTHON=` names, which has torch with CUDA
    python -m bench.gpu_check [--minutes 9] [--results bench/results/gpu] [--commit HASH]

In this order: the extension is built for this GPU; the tests marked gpu and those of the operators on CUDA and Triton
run; then under compute-sanitizer, memcheck and racecheck; then the benchmarks, against eager PyTorch, torch.compile,
hooks, a copy, and Liger where it is installed. As long as build or tests are red, which they also are if they did not
end in time, or a sanitizer has found something, nothing is measured and no file is written. Otherwise the raw samples
go to the folder of results, with check.json: GPU, driver, versions, commit, what ran for how long, and what did not
run and why; a sanitizer that the machine lacks or refuses, or that did not end, is named there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.files import RESULTS
from clue_fast.errors import BackendError

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 9.0
TOOLS = ("/usr/local/cuda/bin",)  # where nvcc and compute-sanitizer are, if not on the PATH
FOUND = 86  # what compute-sanitizer exits with when it has found something

# Every launch once, at sizes with several blocks and with tails: the sanitizer takes some hundred times as long.
SANITIZED = (
    "test_follows_the_definition or test_an_address_changes_no_bit or test_equals_torch_sgd or "
    "test_stochastic_rounding_keeps or test_group_sizes or test_writes_only or test_formulas or "
    "test_launch_functions_write_everything"
)


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: for people.
        kind: "build", "test", "sanitizer" or "bench".
        command: what runs, in the root of the repository.
        at_most: seconds after which it is stopped.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    at_most: float


@dataclass(frozen=True)
class Finished:
    """What came of a command: None as exit code if it was stopped or could not be started."""

    code: int | None
    output: str


@dataclass(frozen=True)
class Outcome:
    """A step, and "passed", "failed", "not run" or "out of time"; the reason is the end of its output."""

    step: Step
    status: str
    seconds: float
    reason: str = ""

    @property
    def red(self) -> bool:
        """Whether nothing is measured after it."""
        if self.step.kind == "sanitizer":
            return self.status == "failed"
        return self.step.kind in ("build", "test") and self.status != "passed"


Run = Callable[[Step, float], Finished]


def steps(scratch: Path, seconds: float = 1.0, python: str = sys.executable) -> list[Step]:
    """What is run, in its order.

    Args:
        scratch: folder for what the benchmarks write.
        seconds: of sampling each comparison.
        python: the interpreter.
    """
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")
    workers = ("-n", "4") if importlib.util.find_spec("xdist") else ()
    tests = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    on_gpu = ("tests/ops", "-k", "(cuda or triton) and not host", "-m", "not slow and not gpu")
    made = [
        Step("extension", "build", (python, *pip), 150),
        Step("tests marked gpu", "test", (*tests, *workers, "tests", "-m", "gpu"), 150),
        Step("operators on CUDA and Triton", "test", (*tests, *workers, *on_gpu), 150),
    ]
    for tool in ("memcheck", "racecheck"):
        watched = ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND))
        selected = ("tests/ops", "-k", f"(cuda or triton) and not host and ({SANITIZED})", "-m", "not slow and not gpu")
        made.append(Step(tool, "sanitizer", (*watched, *tests, *selected), 75))
    benches = {
        "ops/bench_gated_activation": (),
        "ops/bench_sparse_optimizer": (),
        "ops/bench_channel_statistics": (),
        "ops/bench_sparse_linear": (),
        "ops/bench_conflict_score": (),
        "ops/bench_scoring": (),
        "model/bench_forward": ("-m", "gpu"),
        "model/bench_training": ("-k", "base or bfloat16"),
        "model/bench_localize": (),
        "ops/bench_columns_as_rows": (),
    }
    for name, selected in benches.items():
        folders = ("--results", str(scratch), "--benchmark-json", str(scratch / "all" / f"{Path(name).name}.json"))
        options = ("--device", "cuda", "--seconds", str(seconds), *folders)
        chosen = selected if "-m" in selected else ("-m", "not slow", *selected)
        made.append(Step(name, "bench", (*tests, f"bench/{name}.py", *options, *chosen), 120))
    return made


def require_gpu() -> None:
    """Raise BackendError where there is no GPU, no nvcc, or nothing that tests could run with."""
    if not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} sees no CUDA device; gpu-check needs one, and a torch with CUDA")
    if shutil.which("nvcc", path=environment()["PATH"]) is None:
        raise BackendError(f"nvcc is neither on the PATH nor in {', '.join(TOOLS)}; without it no CUDA kernel is built")
    for package in ("pytest", "pytest_benchmark", "hypothesis", "pybind11", "setuptools"):
        if importlib.util.find_spec(package) is None:
            raise BackendError(f"{package} is not installed; pip install '.[test]' pybind11 setuptools brings it")


def environment() -> dict[str, str]:
    """Of the commands: a test whose backend cannot run fails, the sanitizer sees every allocation."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *TOOLS])
    return {
        **os.environ,
        "PATH": path,
        "CLUE_FAST_REQUIRE_EXTENSION": "1",
        "CLUE_FAST_CUDA_ARCH": "native",
        "CLUE_FAST_TEST_REQUIRE_GPU": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run(step: Step, at_most: float) -> Finished:
    """Runs a command; with all that it started it is stopped when its time is over."""
    variables = environment()
    if step.kind == "sanitizer":
        variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or a read behind a tensor ends in the same block of memory
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=variables, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Finished(None, f"{step.command[0]} cannot be started: {error.strerror}")
        try:
            code: int | None = process.wait(at_most)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
        output.seek(0)
        return Finished(code, output.read())


def outcome(step: Step, finished: Finished, seconds: float) -> Outcome:
    """What a finished command means. Tests of which none ran have not passed."""
    tail = "\n".join(finished.output.strip().splitlines()[-15:])
    if finished.code is None:
        status = "not run" if "cannot be started" in finished.output else "out of time"
        return Outcome(step, status, seconds, tail)
    if step.kind == "sanitizer" and "ERROR SUMMARY" not in finished.output:
        said = [line for line in finished.output.splitlines() if line.startswith("=========")]
        return Outcome(step, "not run", seconds, "\n".join(said[-5:]) or tail)
    if finished.code != 0:
        return Outcome(step, "failed", seconds, tail)
    if step.kind != "build" and not re.search(r"\b[1-9]\d* passed", finished.output):
        return Outcome(step, "not run", seconds, tail)
    return Outcome(step, "passed", seconds)


def check(
    planned: Iterable[Step],
    run: Run = run,
    budget: float = 60 * MINUTES,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> list[Outcome]:
    """Runs the steps one after the other while there is time.

    Args:
        planned: builds first, then tests, sanitizers and benchmarks.
        run: runs one step, for so many seconds at most.
        budget: seconds for all.
        clock: of seconds.
        say: takes a line for each step.

    Returns:
        An outcome for each step. Nothing runs after a red build, and no benchmark after anything red.
    """
    end = clock() + budget
    found: list[Outcome] = []
    for step in planned:
        started = clock()
        red = [done.step for done in found if done.red]
        if red and (step.kind == "bench" or red[0].kind == "build"):
            found.append(Outcome(step, "not run", 0.0, f"{red[0].name} is red"))
        elif end - started < 1:
            found.append(Outcome(step, "out of time", 0.0, "no time was left"))
        else:
            finished = run(step, min(step.at_most, end - started))
            found.append(outcome(step, finished, clock() - started))
        last = found[-1]
        say(f"{last.step.name}: {last.status}, {last.seconds:.0f} s" + (f"\n{last.reason}" if last.reason else ""))
    return found


def write(results: Path, scratch: Path, outcomes: Sequence[Outcome], about: dict[str, Any]) -> Path:
    """Takes the samples over and writes check.json beside them.

    Raises:
        RuntimeError: a gate is red; then nothing is written.
    """
    red = [done.step.name for done in outcomes if done.red]
    if red:
        raise RuntimeError(f"no result is kept while these are red: {', '.join(red)}")
    results.mkdir(parents=True, exist_ok=True)
    for samples in sorted(scratch.glob("*.json")):
        shutil.copy(samples, results / samples.name)
    ran = [
        {**asdict(done.step), "status": done.status, "seconds": round(done.seconds, 1), "reason": done.reason}
        for done in outcomes
    ]
    target = results / "check.json"
    target.write_text(json.dumps({"machine": about, "steps": ran}, indent=1) + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Exit code 1 if anything is red, 2 if nothing can run here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu", help="folder of the samples")
    parser.add_argument("--commit", help="of this tree, where there is no git")
    options = parser.parse_args()
    started = time.monotonic()
    if options.commit:
        os.environ["CLUE_FAST_COMMIT"] = options.commit
    try:
        require_gpu()
    except BackendError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "all").mkdir()
        outcomes = check(steps(scratch), budget=60 * options.minutes - (time.monotonic() - started))
        machine.use_device("cuda")
        try:
            print(f"written: {write(options.results, scratch, outcomes, machine.describe())}")
        except RuntimeError as error:
            print(error, file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
