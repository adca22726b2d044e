"""Writes docs/families.md from the results of test_families.py, slow ones included.

python tests/models/families_table.py [FILE]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES

COLUMNS = {
    "test_sites": "sites found",
    "test_parity": "logits",
    "test_statistics": "statistics",
    "test_checkpointing": "checkpointing",
    "test_compile": "compile",
    "test_unpatch": "unpatch",
}
HEAD = """# Model families

Made by `python tests/models/families_table.py` with torch {torch} and transformers {transformers}, on tiny models
with random weights. Every cell is a test of `tests/models/test_families.py`.

- **sites found**: every MLP of every layer, and nothing that looks like one is left over.
- **logits**: of the patched model, recording and not, float32 and bfloat16: from float64, and from the stock model, at
  most twice as far as the stock model is from float64.
- **statistics**: with a·∂L/∂a, of MLP channels, expert channels and attention heads, against hooks that keep every
  activation in float64.
- **checkpointing**: reentrant and not, tokens count once.
- **compile**: recording inside `torch.compile(fullgraph=True)` gives the same statistics.
- **unpatch**: modules and logits are what they were, bit for bit, and other models were never touched.

"""
NOTES = """
qwen2_vl: compiled with text alone, since its vision tower loops over images; token ids do not reach the heads of that
tower, so that `kinds=("attention",)` needs `strict=False` and records those of the language model.
"""


class Results:
    """pytest plugin: the outcome of every test, by its name and family."""

    def __init__(self) -> None:
        self.outcomes: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.arguments: dict[str, tuple[str, str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Remembers which family each test is about."""
        for item in items:
            self.arguments[item.nodeid] = item.originalname, item.callspec.params["name"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keeps the outcome of a test."""
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[self.arguments[report.nodeid]].add(report.outcome)

    def table(self) -> str:
        """The table in Markdown."""
        lines = [f"| family | structure | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
        for name, family in FAMILIES.items():
            cells = [self.cell(test, name) for test in COLUMNS]
            lines.append(f"| {name} | {', '.join(sorted(family.structures))} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"

    def cell(self, test: str, name: str) -> str:
        """What became of all the cases of one test for one family."""
        outcomes = self.outcomes[test, name]
        return "✓" if outcomes == {"passed"} else ", ".join(sorted(outcomes - {"passed"})) or "not run"


def main() -> int:
    """Runs the tests and writes the file."""
    here = Path(__file__).resolve()
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here.parents[2] / "docs" / "families.md"
    results = Results()
    options = [str(here.with_name("test_families.py")), "-q", "-m", "", "-p", "no:cacheprovider"]
    code = pytest.main(options, plugins=[results])
    versions = {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}
    target.write_text(HEAD.format(**versions) + results.table() + NOTES, encoding="utf-8")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
