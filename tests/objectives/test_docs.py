"""The table of objectives in the documentation is that of the code.

python -m tests.objectives.test_docs     writes it anew
"""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

from bench.files import read_section, write_section
from clue_fast.objectives import OBJECTIVES, Objective

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"
SECTION = "objectives"


def row(name: str, objective: type[Objective]) -> str:
    text = inspect.getdoc(objective) or ""
    what = " ".join(text.partition("\n\n")[0].split())
    source = " ".join(text.partition("Source:")[2].partition("\n\n")[0].split())
    assert what and source, f"{name} does not say what it is and where it is from"
    parameters = ", ".join(f"{field.name}={field.default}" for field in fields(objective))
    cells = (cell.replace("|", r"\|") for cell in (f"`{name}`", what, parameters, source))
    return f"| {' | '.join(cells)} |"


def table() -> str:
    rows = ["| objective | what it is | parameters | source |", "|---|---|---|---|"]
    return "\n".join([*rows, *(row(name, objective) for name, objective in OBJECTIVES.items())]) + "\n"


def test_the_page_lists_the_objectives_there_are() -> None:
    assert read_section(PAGE, SECTION) == table()


if __name__ == "__main__":
    write_section(PAGE, SECTION, table())
