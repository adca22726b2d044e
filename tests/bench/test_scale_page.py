"""The figures of docs/scale.md are those that are computed."""

from __future__ import annotations

from bench.scale import BEGIN, END, PAGE, SHAPES, flop_rows, gpu_rows, memory_rows, plans


def written() -> str:
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def test_the_rows_of_a_shape_are_what_is_computed():
    found = plans(("llama3-1b",))
    for rows in (memory_rows, flop_rows, gpu_rows):
        assert f"| {' | '.join(rows(found)[0])} |" in written().splitlines()


def test_every_shape_is_in_every_table():
    """What stands there is written by ``python -m bench.scale``, which takes minutes; one shape is computed above."""
    for shape in SHAPES:
        assert sum(line.startswith(f"| {shape} |") for line in written().splitlines()) >= 2
