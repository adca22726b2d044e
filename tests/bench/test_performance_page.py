"""The figures of docs/performance.md are those of the samples that are kept."""

from __future__ import annotations

import pytest

from bench.files import marks
from bench.speed import PAGE, SECTIONS, text


@pytest.mark.parametrize("section", SECTIONS)
def test_the_tables_are_those_of_the_results(section: str) -> None:
    begin, end = marks(section)
    assert PAGE.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0] == text(section)
