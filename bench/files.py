"""Where raw samples are kept: one file a benchmark in bench/results, with the machine they were taken on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import machine

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
DATA = Path(os.environ.get("CLUE_FAST_DATA", ROOT.parents[1] / "shared" / "data"))
"""Real data, which stay outside of the repository."""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table of Markdown, not aligned as text; cells of the columns behind the first ``left`` stand on the right."""
    rules = ["---" if place < left else "---:" for place in range(len(columns))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rules, *rows))


def _parts(page: Path, section: str) -> list[str] | None:
    """What is before a section, its mark, what stands there, its last mark and the rest; or None without marks."""
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
    before, first, rest = page.read_text(encoding="utf-8").partition(begin)
    between, last, behind = rest.partition(end)
    return [before, first, between, last, behind] if first and last else None


def read_section(page: Path, section: str) -> str | None:
    """What stands between the marks of a section of a page, or None where the page has no such marks."""
    parts = _parts(page, section)
    return None if parts is None else parts[2]


def write_section(page: Path, section: str, text: str) -> None:
    """Replaces that. Raises ValueError where the page has no such marks."""
    parts = _parts(page, section)
    if parts is None:
        raise ValueError(f"{page} has no section {section!r}")
    parts[2] = text.strip("\n") + "\n"
    page.write_text("".join(parts), encoding="utf-8")


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What a benchmark left."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def save(folder: Path, entries: Iterable[Mapping[str, Any]]) -> list[Path]:
    """Writes NAME.json anew for every benchmark of which there are entries.

    Args:
        folder: made if it is not there.
        entries: what the cases left: "file" is NAME, "under" the key below which the "entry" goes, into a list, or by
            its "name" where it has one; "about" is what the whole file says beside the machine.
    """
    files: dict[str, dict[str, Any]] = {}
    for each in entries:
        content = files.setdefault(each["file"], {"machine": machine.describe(), **each.get("about", {})})
        if "name" in each:
            content.setdefault(each["under"], {})[each["name"]] = each["entry"]
        else:
            content.setdefault(each["under"], []).append(each["entry"])
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return [folder / f"{name}.json" for name in files]
