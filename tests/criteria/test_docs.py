"""The table of criteria in the documentation is that of the code.

python -m tests.criteria.test_docs     writes it anew
"""

from __future__ import annotations

from pathlib import Path

from bench.files import read_section, write_section
from clue_fast.criteria import CRITERIA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "localization.md"
SECTION = "criteria"


def table() -> str:
    rows = ["| criterion | formula | passes | source |", "|---|---|---|---|"]
    for name, criterion in CRITERIA.items():
        formula = criterion.formula.replace("|", r"\|")
        rows.append(f"| `{name}` | {formula} | {criterion.measurement.cost} | {criterion.source} |")
    return "\n".join(rows) + "\n"


def test_the_page_lists_the_criteria_there_are() -> None:
    assert read_section(PAGE, SECTION) == table()


if __name__ == "__main__":
    write_section(PAGE, SECTION, table())
