"""Tables and plots of a grid: each method and budget at the learning rate that did best on the tuning part.

What runs come to is in ``scores``. The rate of a method and budget is the one with the best mean score over all seeds
on the tuning part. Differences to the baseline are paired by seed (the same split of the facts); intervals are of
Student's t over the seeds, at 95 %.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from bench.files import markdown_table, read_section, write_section
from bench.unlearning.grid import Grid
from bench.unlearning.kinds import scoring_of
from bench.unlearning.scores import Scoring

Key = TypeVar("Key")

PAGES = ("evidence.md", "results.md", "kinds.md")
"""In docs, where tables and plots stand."""

MARKERS = "osD^vPX*<>"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval, of Student's t; the width is NaN for a single value."""
    if len(values) < 2:
        return mean(values), math.nan
    from scipy.stats import t

    return mean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Chosen:
    """The runs of a method and budget at its own best rate, all draws of a seed together."""

    method: str
    budget: float
    rate: float
    runs: Mapping[int, Sequence[Mapping[str, Any]]]
    scoring: Scoring

    @property
    def every(self) -> list[Mapping[str, Any]]:
        """All its runs."""
        return [run for draws in self.runs.values() for run in draws]

    def values(self, figure: str) -> dict[int, float]:
        """A figure of the report by seed; of several draws their mean."""
        scoring = self.scoring
        return {
            seed: mean(getattr(scoring.figures(run, scoring.reported), figure) for run in draws)
            for seed, draws in self.runs.items()
        }


def choose(runs: Sequence[Mapping[str, Any]], scoring: Scoring) -> dict[tuple[str, float], Chosen]:
    """The best rate of each method and budget, by the tuning part alone; only seeds that all its rates have count."""
    cells: dict[tuple[str, float], dict[float, dict[int, list[Mapping[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for run in runs:
        key = run["key"]
        cells[run["method"], key["budget"]][key["rate"]][key["seed"]].append(run)
    chosen = {}
    for (method, budget), rates in cells.items():
        seeds = set.intersection(*(set(found) for found in rates.values()))
        if not seeds:
            continue
        scores = {
            rate: mean(mean(scoring.figures(run, scoring.tuned).score for run in found[seed]) for seed in seeds)
            for rate, found in rates.items()
        }
        best = max(scores, key=lambda rate: scores[rate])
        own = {seed: rates[best][seed] for seed in sorted(seeds)}
        chosen[method, budget] = Chosen(method, budget, best, own, scoring)
    return chosen


def of_grid(grid: Grid, runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that the grid asks for now; a file may hold others, of rates or budgets that it asked for before."""
    wanted = [run.key(grid) for run in grid.runs()]
    return [run for run in runs if {k: v for k, v in run["key"].items() if k != "facts"} in wanted]


def chosen_of(grid: Grid, runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float], Chosen]:
    """The best rates of what the grid asks for."""
    return choose(of_grid(grid, runs), scoring_of(grid))


def table(grid: Grid, runs: Sequence[Mapping[str, Any]]) -> str:
    """A table of all methods and budgets, with the difference to the baseline at the same budget."""
    chosen = chosen_of(grid, runs)
    written = {
        title: {key: write(one.every) for key, one in chosen.items()}
        for title, write in scoring_of(grid).columns.items()
    }
    further = {title: cells for title, cells in written.items() if set(cells.values()) - {"-"}}
    against = {name: differences(chosen, name) for name in grid.baselines}
    columns = ["method", "budget", "rate", "seeds", "weights", "score", *(f"against {name}" for name in grid.baselines)]
    columns += ["forgotten", "kept", *further, "seconds", "GB"]
    lines = []
    for (method, budget), one in sorted(chosen.items(), key=lambda item: (item[0][1], -_mean(item[1], "score"))):
        every = one.every
        line = [method, f"{budget:.1%}", f"{one.rate:g}", str(len(one.runs))]
        line.append(f"{mean(run['trained'] for run in every):,.0f}")
        line += [shown(one.values("score").values())]
        line += [str(against[name].get((method, budget), "-")) for name in grid.baselines]
        line += [shown(one.values("forgotten").values()), shown(one.values("kept").values())]
        line += [cells[method, budget] for cells in further.values()]
        line.append(f"{mean(run['seconds'] for run in every):.0f}")
        peaks = [run["peak_bytes"] for run in every if run["peak_bytes"] is not None]
        line.append(f"{mean(peaks) / 1e9:.1f}" if peaks else "-")
        lines.append(line)
    return markdown_table(columns, lines, left=2)


def short_table(grid: Grid, runs: Sequence[Mapping[str, Any]]) -> str:
    """The figures of the report alone, against the first baseline."""
    chosen = chosen_of(grid, runs)
    (baseline, *_) = grid.baselines
    against = differences(chosen, baseline)
    columns = ["trains", "weights", "forgotten", "kept", "score", f"against {baseline}"]
    lines = []
    for (method, budget), one in sorted(chosen.items(), key=lambda item: -_mean(item[1], "score")):
        line = [method, f"{mean(run['trained'] for run in one.every):,.0f}"]
        line += [shown(one.values(figure).values()) for figure in ("forgotten", "kept", "score")]
        line.append(str(against.get((method, budget), "-")))
        lines.append(line)
    return markdown_table(columns, lines)


def shown(values: Any) -> str:
    """Mean and interval."""
    middle, half = interval(list(values))
    return f"{middle:.3f}" if math.isnan(half) else f"{middle:.3f} ± {half:.3f}"


@dataclass(frozen=True)
class Difference:
    """How much better a method is than a baseline at the same budget, paired by seed.

    Attributes:
        middle, half: mean of the differences of the scores, and half the width of its 95 % interval, of Student's t.
        p: of Student's paired test; NaN if all differences are 0.
        corrected: p by Holm's method (1979), for all methods and budgets that are compared with that baseline.
    """

    middle: float
    half: float
    p: float
    corrected: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.half):
            return f"{self.middle:+.3f}"
        if math.isnan(self.p):  # where no seed differs
            return f"{self.middle:+.3f} ± {self.half:.3f}"
        return f"{self.middle:+.3f} ± {self.half:.3f} (p {self.p:.3f}, corrected {self.corrected:.3f})"


def differences(chosen: Mapping[tuple[str, float], Chosen], baseline: str) -> dict[tuple[str, float], Difference]:
    """All methods that can be compared with a baseline."""
    pairs = {key: (one, chosen.get((baseline, key[1]))) for key, one in chosen.items() if key[0] != baseline}
    return compared({key: (one, base) for key, (one, base) in pairs.items() if base is not None})


def compared(pairs: Mapping[Key, tuple[Chosen, Chosen]]) -> dict[Key, Difference]:
    """How much better the first of each pair is than the second, where they have seeds in common."""
    from scipy.stats import ttest_rel

    found = {}
    for key, (one, base) in pairs.items():
        mine, theirs = one.values("score"), base.values("score")
        seeds = sorted(set(mine) & set(theirs))
        if not seeds:
            continue
        middle, half = interval([mine[seed] - theirs[seed] for seed in seeds])
        p = math.nan
        if not math.isnan(half):
            p = float(ttest_rel([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds]).pvalue)
        found[key] = Difference(middle, half, p)
    corrected = holm({key: one.p for key, one in found.items() if not math.isnan(one.p)})
    return {key: replace(one, corrected=corrected.get(key, math.nan)) for key, one in found.items()}


def holm(p: Mapping[Key, float]) -> dict[Key, float]:
    """P-values corrected for their number: the smallest times n, the next times n - 1, none below one before it."""
    corrected, largest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=lambda key: p[key])):
        largest = max(largest, min(1.0, p[key] * (len(p) - rank)))
        corrected[key] = largest
    return corrected


def _mean(one: Chosen, figure: str) -> float:
    return mean(one.values(figure).values())


def plot(grid: Grid, runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Forgotten against kept, one point a method and budget, with intervals over the seeds.

    A line joins the points that no other one beats in both; a retrained model, the aim, is none of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = chosen_of(grid, runs)
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    budgets = sorted({budget for _, budget in chosen})
    for number, method in enumerate(grid.methods):
        own = [chosen[method, budget] for budget in budgets if (method, budget) in chosen]
        if not own:
            continue
        kept, gone = ([interval(list(one.values(name).values())) for one in own] for name in ("kept", "forgotten"))
        points, _, bars = axes.errorbar(
            [middle for middle, _ in kept],
            [middle for middle, _ in gone],
            xerr=[0 if math.isnan(half) else half for _, half in kept],
            yerr=[0 if math.isnan(half) else half for _, half in gone],
            fmt=MARKERS[(number + number // 10) % len(MARKERS)],
            color=f"C{number % 10}",
            label=method,
            elinewidth=0.8,
        )
        points.set_alpha(0.8)
        for bar in bars:
            bar.set_alpha(0.35)
    unlearned = [one for (method, _), one in chosen.items() if grid.methods[method].train != "retrained"]
    front = pareto_front((_mean(one, "kept"), _mean(one, "forgotten")) for one in unlearned)
    axes.plot([kept for kept, _ in front], [gone for _, gone in front], color="grey", linestyle=":", zorder=0)
    forgotten, kept_label = scoring_of(grid).labels
    axes.set(xlabel=kept_label, ylabel=forgotten, title=grid.name, xlim=(None, 1.02), ylim=(None, 1.03))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8 if len(grid.methods) <= 20 else 6, loc="outside right upper")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points that no other one reaches in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def write_tables(grid: Grid, runs: Sequence[Mapping[str, Any]], root: Path) -> str:
    """Writes the tables between the marks of the grid in the pages that have them, a short one into README.md.

    The plot goes into docs if a page shows it. Returns the table.
    """
    text, picture, docs = table(grid, runs), f"unlearning_{grid.name}.png", root / "docs"
    section = f"grid {grid.name}"
    for name in PAGES:
        if read_section(docs / name, section) is not None:
            write_section(docs / name, section, text)
        if picture in (docs / name).read_text(encoding="utf-8"):
            plot(grid, runs, docs / picture)
    if read_section(root / "README.md", section) is not None:
        write_section(root / "README.md", section, short_table(grid, runs))
    return text
