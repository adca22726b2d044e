"""Do criteria agree on the units, and does each agree with itself when the data come in another order?

    python examples/tofu_small.py --output tofu
    python examples/criteria_overlap.py tofu/everything --output overlap

Every criterion selects a tenth of the units of each layer of a model that learned TOFU in small, from some records of
the forget and the retain set; the plots show the Jaccard index of every two criteria, and of every two orders.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

from tofu_small import DATA, load_tofu

import clue_fast
from clue_fast.localization import CRITERIA, CircuitSettings
from clue_fast.localization.plots import overlap_figure
from clue_fast.selection import Selection
from clue_fast.workflow import load_model

ORDERS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with a model that knows TOFU, such as tofu/everything")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with TOFU; from the hub if it does not exist")
    parser.add_argument("--records", type=int, default=40, help="of each set (40)")
    parser.add_argument("--output", type=Path, default=Path("overlap"), help="folder for plots and figures (overlap)")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(options.model)
    sets = load_tofu(options.data)
    forget, retain = (sets[name][: options.records] for name in ("forget", "retain"))
    selections: dict[str, list[Selection]] = {}
    for criterion in (*CRITERIA, "circuit"):
        started = time.perf_counter()
        for order in range(ORDERS):
            rng = random.Random(order)
            selections.setdefault(criterion, []).append(
                clue_fast.localize(
                    model,
                    rng.sample(forget, len(forget)),
                    rng.sample(retain, len(retain)),
                    tokenizer=tokenizer,
                    criterion=criterion,
                    circuit=CircuitSettings(edges=0.05) if criterion == "circuit" else None,
                    seed=order,
                    progress=False,
                )
            )
        own = selections[criterion]
        worst = min(a.overlap(b) for a in own for b in own)
        seconds = (time.perf_counter() - started) / ORDERS
        print(f"{criterion:<22}{len(own[0]):>6} units  least overlap across orders {worst:.2f}  {seconds:.1f} s a run")
    first = {criterion: own[0] for criterion, own in selections.items()}
    orders = {f"{criterion}, order {i}": s for criterion, own in selections.items() for i, s in enumerate(own)}
    overlap_figure(first).savefig(options.output / "criteria.png", dpi=120)
    overlap_figure(orders).savefig(options.output / "orders.png", dpi=120)
    overlaps = {a: {b: first[a].overlap(first[b]) for b in first} for a in first}
    (options.output / "overlap.json").write_text(json.dumps(overlaps, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
