"""Every module of the benchmarks imports what is there."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import bench

ROOT = Path(bench.__file__).parent
MODULES = sorted(
    ".".join(("bench", *path.relative_to(ROOT).with_suffix("").parts))
    for path in ROOT.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


@pytest.mark.parametrize("name", MODULES)
def test_it_is_imported(name: str) -> None:
    importlib.import_module(name)
