"""The figures of docs/performance.md are those of the samples that are kept."""

from __future__ import annotations

from bench.speed import BEGIN, END, PAGE, section


def test_the_tables_are_those_of_the_results() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == section()
