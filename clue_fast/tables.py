"""Tables of text: cells in columns of one width, with or without the marks of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Row = Sequence[str]


def aligned(rows: Sequence[Row], left: int = 1) -> list[str]:
    """Returns the rows as lines, two spaces between the columns.

    Args:
        rows: cells, as many in each row.
        left: columns, from the first on, whose cells stand on the left; those of the others stand on the right.
    """
    return ["  ".join(cells).rstrip() for cells in _padded(rows, left)]


def markdown(rows: Sequence[Row], left: int = 1) -> str:
    """Returns the rows as a Markdown table that is aligned as text, too; the first is its head.

    Args:
        rows: cells, as many in each row.
        left: see ``aligned``.
    """
    head, *body = _padded(rows, left)
    rule = ["-" * len(cell) if column < left else "-" * (len(cell) - 1) + ":" for column, cell in enumerate(head)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *body))


def _padded(rows: Sequence[Row], left: int) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        [
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
