"""The report of a patched model: what runs at every site, as a table, as HTML, as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clue_fast.tables import aligned

_COLUMNS = ("site", "kind", "units", "operator", "backend", "launches", "tokens", "note")


@dataclass(frozen=True)
class SiteReport:
    """What runs at one site.

    Attributes:
        path: of the module.
        kind, width: of the units; experts stacked in one module share an entry, ``experts`` says how many.
        experts: number of stacked experts, or 1.
        operator: what computes the statistics, or "none" where nothing is recorded.
        fused: whether the module's forward was replaced by the fused operator.
        backend: the operator's.
        reason: why that backend, or why the site is not fused or not recorded.
        launches: recordings by eager code; compiled code counts tokens only.
        tokens: tokens counted, by group; of experts, over all of them.
        nonfinite: tokens left out as not finite.
    """

    path: str
    kind: str
    width: int
    experts: int
    operator: str
    fused: bool
    backend: str
    reason: str
    launches: int
    tokens: dict[str, int]
    nonfinite: int


@dataclass(frozen=True)
class Report:
    """What ``patch`` found and replaced, site by site. Prints as a table, and shows as one in a notebook.

    Attributes:
        model: class of the model.
        fingerprint: of the model.
        sites: one entry per site.
        skipped: batches left out as not finite.
    """

    model: str
    fingerprint: str
    sites: Sequence[SiteReport]
    skipped: int

    def __str__(self) -> str:
        rows = [_COLUMNS, *(_row(entry) for entry in self.sites)]
        return "\n".join([*aligned(rows, left=len(_COLUMNS)), self._summary()])

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON holds it."""
        return asdict(self)

    def to_json(self) -> str:
        """Returns the report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_html(self) -> str:
        """Returns the report as an HTML table."""
        head = "".join(f"<th>{title}</th>" for title in _COLUMNS)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _row(entry)) + "</tr>" for entry in self.sites
        )
        return (
            f"<table>\n<caption>{html.escape(self._summary())}</caption>\n<thead><tr>{head}</tr></thead>\n"
            f"<tbody>\n{body}\n</tbody>\n</table>"
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def _summary(self) -> str:
        recorded = [entry for entry in self.sites if entry.operator != "none"]
        fused = sum(entry.fused for entry in recorded)
        units = sum(entry.width * entry.experts for entry in recorded)
        skipped = f", {self.skipped} batches skipped as not finite" if self.skipped else ""
        return (
            f"{self.model} {self.fingerprint}: {len(recorded)} of {len(self.sites)} sites recorded, {fused} of them "
            f"fused, {units} units{skipped}"
        )


def _row(entry: SiteReport) -> tuple[str, ...]:
    units = f"{entry.experts} x {entry.width}" if entry.experts > 1 else str(entry.width)
    tokens = ", ".join(f"{name} {count}" for name, count in entry.tokens.items())
    lost = f"{entry.nonfinite} tokens not finite; " if entry.nonfinite else ""
    return (
        entry.path,
        entry.kind,
        units,
        entry.operator,
        entry.backend,
        str(entry.launches),
        tokens,
        lost + entry.reason,
    )
