"""Do criteria agree on the units, and does each agree with itself when the data come in another order?

    python examples/tofu_small.py --output tofu
    python examples/criteria_overlap.py tofu/everything --output overlap

Every criterion selects a tenth of the units of each layer of a model that learned TOFU in small, from some records of
the forget and the retain set; then from the same records in other orders, and from other records. One plot shows the
Jaccard index of every two criteria, the other that of each with itself.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from itertools import combinations
from pathlib import Path

from matplotlib.figure import Figure
from tofu_small import DATA, load_tofu

import clue_fast
from clue_fast.config import CircuitConfig
from clue_fast.criteria import CRITERIA
from clue_fast.data import Record
from clue_fast.reporting import overlap_figure
from clue_fast.selection import Selection
from clue_fast.trainer.checkpoints import load_model

SEEDS = 2
CHANCE = 0.1 / (2 - 0.1)
"""Jaccard index of two independent tenths: a hundredth in both, 19 hundredths in either."""


def draws(sets: dict[str, list[Record]], records: int) -> dict[str, list[dict[str, list[Record]]]]:
    """Returns what to select from: ``SEEDS`` orders of the same records, and as many disjoint draws of records."""
    shuffled = {name: random.Random(0).sample(sets[name], SEEDS * records) for name in ("forget", "retain")}
    parts = [{name: own[i * records : (i + 1) * records] for name, own in shuffled.items()} for i in range(SEEDS)]
    orders = [{name: random.Random(i).sample(own, records) for name, own in parts[0].items()} for i in range(1, SEEDS)]
    return {"other order": [parts[0], *orders], "other records": parts}


def stability_figure(overlaps: dict[str, dict[str, list[float]]]) -> Figure:
    """The Jaccard index of each criterion with itself: a dot for every two orders, and every two draws, of the data."""
    figure = Figure(figsize=(7.0, 1.2 + 0.32 * len(overlaps)), layout="constrained")
    axes = figure.subplots()
    for kind, marker, color in (("other order", "o", "#2471a3"), ("other records", "D", "#c0392b")):
        points = [(value, row) for row, own in enumerate(overlaps.values()) for value in own[kind]]
        axes.scatter(*zip(*points, strict=True), marker=marker, s=22, color=color, alpha=0.6, label=kind, linewidths=0)
    axes.set_yticks(range(len(overlaps)), list(overlaps))
    axes.invert_yaxis()
    axes.grid(axis="y", linewidth=0.4)
    axes.axvline(CHANCE, color="#55606a", linewidth=0.8, linestyle="--", label="two random tenths")
    axes.set(xlim=(-0.02, 1.02), xlabel="Jaccard index of the units to train, of two selections by the same criterion")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a model that knows TOFU, such as tofu/everything")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with TOFU; from the hub if it does not exist")
    parser.add_argument("--records", type=int, default=40, help="of each set (40)")
    parser.add_argument("--output", type=Path, default=Path("overlap"), help="folder for plots and figures (overlap)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    drawn = draws(load_tofu(options.data), options.records)
    first: dict[str, Selection] = {}
    stability: dict[str, dict[str, list[float]]] = {}
    for criterion in CRITERIA:
        started = time.perf_counter()

        def select(sets: dict[str, list[Record]], seed: int, criterion: str = criterion) -> Selection:
            return clue_fast.localize(
                model,
                sets["forget"],
                sets["retain"],
                tokenizer=tokenizer,
                criterion=criterion,
                kinds=["mlp"],  # circuits would have heads too, which the others know nothing of
                circuit=CircuitConfig(edges=0.05) if criterion == "circuit" else None,
                seed=seed,
                progress=False,
            )

        first[criterion] = select(drawn["other order"][0], seed=0)
        stability[criterion] = {}
        for kind, variants in drawn.items():
            own = [first[criterion], *(select(sets, seed) for seed, sets in enumerate(variants[1:], start=1))]
            stability[criterion][kind] = [a.overlap(b) for a, b in combinations(own, 2)]
        seconds = (time.perf_counter() - started) / (2 * SEEDS - 1)
        kept = "  ".join(f"{kind} {min(values):.2f}" for kind, values in stability[criterion].items())
        print(f"{criterion:<22}{len(first[criterion]):>6} units  least overlap: {kept}  {seconds:.1f} s a run")
    overlap_figure(first).savefig(options.output / "criteria.png", dpi=90)
    stability_figure(stability).savefig(options.output / "stability.png", dpi=90)
    figures = {
        "criteria": {a: {b: first[a].overlap(first[b]) for b in first} for a in first},
        "stability": stability,
    }
    (options.output / "overlap.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
