"""Writes docs/families.md from the results of test_families.py, slow ones included.

python tests/models/families_table.py [FOLDER ...]

Runs the tests with the transformers of this environment, and with those installed in each folder (as by ``pip install
--target FOLDER``; ``make families`` names the oldest that the package declares).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
PAGE = HERE.parents[2] / "docs" / "families.md"
COLUMNS = {
    "test_sites": "sites found",
    "test_parity": "logits",
    "test_statistics": "statistics",
    "test_checkpointing": "checkpointing",
    "test_compile": "compile",
    "test_unpatch": "unpatch",
}
HEAD = """# Model families

Made by `make families` with torch {torch} and transformers {transformers}, on tiny models with random weights. Every
cell is a test of `tests/models/test_families.py`, and holds for {which} unless it says otherwise.

- **sites found**: every MLP of every layer, and nothing that looks like one is left over.
- **logits**: of the patched model, recording and not, float32 and bfloat16: from float64, and from the stock model, at
  most twice as far as the stock model is from float64.
- **statistics**: with a·∂L/∂a, of MLP channels, expert channels and attention heads: in float64 against hooks that keep
  every activation; in float32, from float64 at most twice as far as PyTorch's own of the stock model.
- **checkpointing**: reentrant and not, tokens count once.
- **compile**: recording inside `torch.compile(fullgraph=True)` gives the same statistics.
- **unpatch**: modules and logits are what they were, bit for bit, and other models were never touched.

"""
NOTES = """
gemma3n: its first layers keep the greatest channels only, and are recorded through a hook; `strict=False` says so.

qwen2_vl: compiled with text alone, since its vision tower loops over images; token ids do not reach the heads of that
tower, so that `kinds=("attention",)` needs `strict=False` and records those of the language model.
"""


class Recorder:
    """pytest plugin: the outcomes of every test, by its name and family."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.arguments: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Remembers which family each test is about."""
        for item in items:
            self.arguments[item.nodeid] = item.originalname.removesuffix("_in_float32"), item.callspec.params["name"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the outcome of a test, or why it was skipped."""
        if report.when == "call" or report.outcome != "passed":
            test, family = self.arguments[report.nodeid]
            outcome = report.longrepr[2].removeprefix("Skipped: ") if report.skipped else report.outcome
            self.outcomes[test][family].add(outcome)


@dataclass(frozen=True)
class Run:
    """What became of all tests with one transformers.

    Attributes:
        torch, transformers: versions.
        outcomes: by test and family, all that occurred.
    """

    torch: str
    transformers: str
    outcomes: dict[str, dict[str, list[str]]]

    def cell(self, test: str, family: str) -> str:
        """What became of all the cases of one test for one family."""
        outcomes = set(self.outcomes.get(test, {}).get(family, ["not run"]))
        return "✓" if outcomes == {"passed"} else ", ".join(sorted(outcomes - {"passed"}))


def run_here(target: Path) -> int:
    """Runs the tests in this process, and writes what became of them as JSON."""
    import torch
    import transformers

    recorder = Recorder()
    options = [str(HERE.with_name("test_families.py")), "-q", "-m", "", "-p", "no:cacheprovider"]
    code = pytest.main(options, plugins=[recorder])
    outcomes = {t: {f: sorted(found) for f, found in by.items()} for t, by in recorder.outcomes.items()}
    version = torch.__version__.partition("+")[0]
    target.write_text(json.dumps([version, transformers.__version__, outcomes]), encoding="utf-8")
    return int(code)


def run_with(folder: str | None) -> tuple[Run, int]:
    """Runs the tests in a process that finds transformers in a folder, or in this environment."""
    environment = os.environ if folder is None else os.environ | {"PYTHONPATH": str(Path(folder).resolve())}
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "results.json"
        code = subprocess.run([sys.executable, HERE, "--results", target], env=environment).returncode
        return Run(*json.loads(target.read_text(encoding="utf-8"))), code


def cell(runs: list[Run], test: str, family: str) -> str:
    """One sign where all runs agree, or else what each gave."""
    cells = {run.transformers: run.cell(test, family) for run in runs}
    return next(iter(cells.values())) if len(set(cells.values())) == 1 else "; ".join(map(": ".join, cells.items()))


def page(runs: list[Run]) -> str:
    """The whole page in Markdown."""
    from tests.models.families import FAMILIES

    versions = [run.transformers for run in runs]
    head = HEAD.format(
        torch=runs[0].torch,
        transformers=" and ".join(versions),
        which={1: "this version", 2: "both versions"}.get(len(runs), "all versions"),
    )
    lines = [f"| family | structure | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, family in FAMILIES.items():
        cells = [cell(runs, test, name) for test in COLUMNS]
        lines.append(f"| {name} | {', '.join(sorted(family.structures))} | {' | '.join(cells)} |")
    return head + "\n".join(lines) + "\n" + NOTES


def main() -> int:
    """Runs the tests with every transformers, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="holds another transformers")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.results is not None:
        return run_here(arguments.results)
    found = [run_with(folder) for folder in (*arguments.folders, None)]
    sys.path.insert(0, str(HERE.parents[2]))
    PAGE.write_text(page([run for run, _ in found]), encoding="utf-8")
    return max(code for _, code in found)


if __name__ == "__main__":
    sys.exit(main())
