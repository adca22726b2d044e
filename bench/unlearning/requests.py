"""Requests to forget that come one after another, and what each of them does to those before it.

Of a method with several requests the records to forget are dealt out in their order, into as many parts of one size.
Each part is unlearned on the model that the one before left, with its own selection and its own training: the original
model of an objective is that one, too. The set to keep is the same each time, and the steps of the grid are those of
all requests together. The same method with one request, of everything at once, has the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from bench.files import markdown_table, read_section, write_section
from bench.unlearning.grid import Grid, Run
from bench.unlearning.kinds import scoring_of
from bench.unlearning.methods import shares
from bench.unlearning.scores import Found
from bench.unlearning.tables import PAGES, Chosen, chosen_of, compared, shown
from clue_fast.data import Record

Item = TypeVar("Item")

REQUEST_SEED = 1_000_000
"""How far apart the random seeds of requests are."""

COLUMNS = ("kept, other kinds", "held out", "kept: retain", "text")
"""Of ``Scoring.columns``, those that say something of a model between two requests."""


def requests_of(
    sets: Mapping[str, list[Record]], run: Run, steps: int
) -> Iterator[tuple[Run, int, dict[str, list[Record]]]]:
    """Deals out what is to be forgotten: for each request the run with its own random seed, its steps and its sets.

    Raises:
        ValueError: the records cannot be dealt out evenly, or there are fewer steps than requests.
    """
    number = run.method.requests
    dealt = zip(parts(sets["forget"], number), shares(steps, number), strict=True)
    for place, (forget, own) in enumerate(dealt):
        yield replace(run, seed=run.seed + REQUEST_SEED * place), own, {**sets, "forget": list(forget)}


def parts(values: Sequence[Item], number: int) -> list[Sequence[Item]]:
    """A list in that many pieces of one size. Raises ValueError if there are no such pieces."""
    size, rest = divmod(len(values), number)
    if rest or not size:
        raise ValueError(f"{len(values)} records cannot be dealt out evenly for {number} requests")
    return [values[place * size : (place + 1) * size] for place in range(number)]


def stages_of(run: Found) -> list[Found]:
    """A run as it would be had it ended after each of its requests."""
    return [{**run, "after": after} for after in (*run.get("on_the_way", ()), run["after"])]


def of_part(run: Found, name: str, place: int, number: int) -> Found:
    """A run with only those values of a set that belong to one of so many parts."""
    cut = {
        stage: {name: {figure: parts(values, number)[place] for figure, values in run[stage][name].items()}}
        for stage in ("before", "after")
    }
    return {**run, **cut}


def requests_table(grid: Grid, runs: Sequence[Found]) -> str:
    """What is forgotten of each part and kept, after each request and after one of everything; empty without requests.

    What was not asked to be forgotten yet stands in brackets.
    """
    number = max(method.requests for method in grid.methods.values())
    if number == 1:
        return ""
    chosen, scoring = chosen_of(grid, runs), scoring_of(grid)
    against = compared(_pairs(grid, chosen))
    written = [title for title in COLUMNS if title in scoring.columns]
    columns = ["method", "rate", "seeds", "after", *(f"part {place + 1}" for place in range(number))]
    columns += ["forgotten", "kept", *written, "score", "against all at once", "seconds"]
    lines = []
    forget, _ = scoring.reported
    for (method, budget), one in chosen.items():
        requests = grid.methods[method].requests
        by_seed = {seed: [stages_of(run) for run in own] for seed, own in one.runs.items()}
        for asked in range(requests):
            last = asked == requests - 1
            stage = Chosen(method, budget, one.rate, {s: [r[asked] for r in rs] for s, rs in by_seed.items()}, scoring)
            line = [method, f"{one.rate:g}", str(len(one.runs)), "all at once" if requests == 1 else str(asked + 1)]
            for place in range(number):
                gone = mean(scoring.forgotten(of_part(run, forget, place, number), forget) for run in stage.every)
                due = (place + 1) * requests <= (asked + 1) * number
                line.append(f"{gone:.2f}" if due else f"({gone:.2f})")
            line += [shown(stage.values("forgotten").values()) if last else "", shown(stage.values("kept").values())]
            line += [scoring.columns[title](stage.every) for title in written]
            line += [shown(stage.values("score").values()) if last else ""]
            line += [str(against.get((method, budget), "")) if last else ""]
            line.append(f"{mean(run['seconds'] for run in one.every):.0f}" if last else "")
            lines.append(line)
    return markdown_table(columns, lines)


def _pairs(grid: Grid, chosen: Mapping[tuple[str, float], Chosen]) -> dict[tuple[str, float], tuple[Chosen, Chosen]]:
    """Methods of several requests, each with the one that differs in nothing but its name and asks once."""
    at_once = {name: method for name, method in grid.methods.items() if method.requests == 1}
    pairs: dict[tuple[str, float], tuple[Chosen, Chosen]] = {}
    for (name, budget), one in chosen.items():
        method = grid.methods[name]
        for other, same in at_once.items():
            if method.requests > 1 and replace(method, requests=1) == same and (other, budget) in chosen:
                pairs[name, budget] = (one, chosen[other, budget])
    return pairs


def write_requests_table(grid: Grid, runs: Sequence[Mapping[str, Any]], root: Path) -> str:
    """Writes that table between its marks in the pages of docs that have them, and returns it."""
    text, section = requests_table(grid, runs), f"requests of grid {grid.name}"
    for page in (root / "docs" / name for name in PAGES):
        if text and read_section(page, section) is not None:
            write_section(page, section, text)
    return text
