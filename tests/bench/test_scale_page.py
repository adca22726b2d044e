"""The figures of docs/scale.md are those that are computed."""

from __future__ import annotations

import pytest

from bench.scale import BEGIN, END, PAGE, SHAPES, flop_rows, gpu_rows, memory_rows, plans, section


def written() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def test_the_rows_of_a_shape_are_what_is_computed():
    found = plans(("llama3-1b",))
    for rows in (memory_rows, flop_rows, gpu_rows):
        assert f"| {' | '.join(rows(found)[0])} |" in written().splitlines()


@pytest.mark.slow
def test_all_tables_are_what_is_computed():
    assert written() == section(plans(SHAPES))
