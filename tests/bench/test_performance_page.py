"""The figures of docs/performance.md are those of the samples that are kept."""

from __future__ import annotations

import pytest

from bench.files import read_section
from bench.speed import PAGE, SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_the_tables_are_those_of_the_results(section: str) -> None:
    assert read_section(PAGE, section) == SECTIONS[section]().strip("\n") + "\n"
