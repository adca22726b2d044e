"""docs/families.md is of the families there are, and of the oldest transformers that the package declares."""

from __future__ import annotations

import re
from pathlib import Path

from tests.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
LACKS = "the stock model does not (compile|run in bfloat16)|not in this transformers"
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def test_every_family_passes_every_test() -> None:
    """But for what the stock model cannot do."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert [name for name, *_ in rows[1:]] == list(FAMILIES)
    for name, _, *cells in rows[1:]:
        for cell in cells:
            assert re.fullmatch(rf"✓|([\d.]+: (✓|{LACKS})(; )?)+", cell), f"{name}: {cell}"


def test_made_with_the_oldest_transformers() -> None:
    declared = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert declared is not None
    assert re.search(rf"transformers {re.escape(declared[1])}(\.0)* and ", PAGE)
