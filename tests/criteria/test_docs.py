"""The table of criteria in the documentation is that of the code.

python tests/criteria/test_docs.py     writes it anew
"""

from __future__ import annotations

from pathlib import Path

from clue_fast.criteria import CRITERIA

PAGE = Path(__file__).resolve().parents[2] / "docs" / "localization.md"
BEGIN, END = "<!-- criteria -->\n", "<!-- end of criteria -->"


def table() -> str:
    rows = ["| criterion | formula | passes | source |", "|---|---|---|---|"]
    for name, criterion in CRITERIA.items():
        formula = criterion.formula.replace("|", r"\|")
        rows.append(f"| `{name}` | {formula} | {criterion.measurement.cost} | {criterion.source} |")
    return "\n".join(rows) + "\n"


def test_the_page_lists_the_criteria_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], encoding="utf-8")
