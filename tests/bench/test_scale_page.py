"""The figures of docs/scale.md are those that are computed."""

from __future__ import annotations

from bench.files import read_section
from bench.scale import PAGE, SECTION, SHAPES, flop_rows, gpu_rows, memory_rows, plans


def written() -> list[str]:
    return (read_section(PAGE, SECTION) or "").splitlines()


def test_the_rows_of_a_shape_are_what_is_computed():
    found = plans(("llama3-1b",))
    for rows in (memory_rows, flop_rows, gpu_rows):
        assert f"| {' | '.join(rows(found)[0])} |" in written()


def test_every_shape_is_in_every_table():
    """What stands there is written by ``python -m bench.scale``, which takes minutes; one shape is computed above."""
    for shape in SHAPES:
        assert sum(line.startswith(f"| {shape} |") for line in written()) >= 2
