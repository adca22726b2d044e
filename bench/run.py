"""Runs the benchmarks, keeps their raw samples in bench/results and prints tables with their targets.

    python -m bench.run             everything
    python -m bench.run forward     the files whose name holds one of the words

A file bench_NAME.py with a function `comparisons` gives interleaved comparisons (see bench.interleaved); of one
without, the pytest-benchmark cases are run. Best on a machine with nothing else to do; some minutes.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import interleaved, machine

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"


def main(words: Sequence[str]) -> None:
    machine.use_all_cores()
    if warning := machine.warning():
        print(warning)
    RESULTS.mkdir(exist_ok=True)
    files = [path for path in sorted(ROOT.rglob("bench_*.py")) if not words or any(word in path.stem for word in words)]
    if not files:
        sys.exit(f"no benchmark's name holds {' or '.join(words)}")
    for path in files:
        started = time.perf_counter()
        name = path.stem.removeprefix("bench_")
        print(f"\n# {name}")
        module = importlib.import_module(".".join(("bench", *path.relative_to(ROOT).with_suffix("").parts)))
        if hasattr(module, "comparisons"):
            _compare(name, module.comparisons())
        else:
            _run_pytest_benchmark(name, path)
        print(f"\n{name}: {time.perf_counter() - started:.0f} s, samples in {RESULTS.name}/{name}.json")


def _compare(name: str, comparisons: Iterable[interleaved.Comparison]) -> None:
    description, results = machine.describe(), []
    for comparison in comparisons:
        result = interleaved.run(comparison)
        results.append(result.as_dict())
        print(f"\n{result.table()}", flush=True)
        save(name, {"machine": description, "comparisons": results})


def save(name: str, content: object) -> None:
    """Writes results/NAME.json."""
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _run_pytest_benchmark(name: str, path: Path) -> None:
    options = ["--benchmark-json", str(RESULTS / f"{name}.json"), "--benchmark-columns", "min,median,iqr,rounds"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path), *options]
    subprocess.run(command, cwd=ROOT.parent, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
