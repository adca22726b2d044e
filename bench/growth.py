"""How a training step grows with tokens, layers, width and share of units: fitted exponents and a plot.

    python -m bench.growth

Each axis is varied alone around a Llama of 8 layers x 512, 5 % of the units of every layer and 4 x 128 tokens; units
of an MLP grow with the width. A step of ours and one that trains all weights take turns, as in
``bench.model.bench_training``. An exponent is the slope of a line through log time against log size; its interval is
that of 1,000 draws of rounds at every point. Raw seconds are kept in ``bench/results/growth.json``.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import linear_regression, median
from typing import Any

from bench import machine
from bench.files import RESULTS, ROOT, load, markdown_table
from bench.interleaved import Ratio
from bench.model.bench_training import Point, Training

PLOT = ROOT.parent / "docs" / "growth.png"
FILE = "growth"
BASE = Point(tokens=128)
AXES: dict[str, list[tuple[float, Point]]] = {
    "tokens": [(128 * n, replace(BASE, records=n)) for n in (1, 2, 4, 8, 16)],
    "layers": [(n, replace(BASE, depth=n)) for n in (2, 4, 8, 16)],
    "width": [(n, replace(BASE, width=n)) for n in (256, 512, 1024)],
    "share of units": [(share, replace(BASE, fraction=share)) for share in (0.01, 0.03, 0.1, 0.3)],
}
METHODS = ("ours", "full")
PARTS = {
    "a step": ("ours", ("forward", "backward", "optimizer")),
    "its optimizer": ("ours", ("optimizer",)),
    "all weights": ("full", ("forward", "backward", "optimizer")),
}
"""What is fitted: of which method, the sum of which phases."""
ROUNDS = 7

Samples = dict[str, dict[str, list[float]]]


def main() -> None:
    """Measures all points, and writes samples and plot."""
    machine.use_all_cores()
    axes: dict[str, list[dict[str, Any]]] = {}
    for axis, points in AXES.items():
        for size, point in points:
            training = Training(point, 0.0, METHODS)
            for _ in range(ROUNDS):
                training.round()
            samples = training.measurement.samples
            axes.setdefault(axis, []).append({"size": size, "point": asdict(point), "samples": samples})
            times = {name: 1e3 * median(seconds(samples, name)) for name in PARTS}
            print(axis, size, ", ".join(f"{name} {time:.1f} ms" for name, time in times.items()), flush=True)
    content = {"machine": machine.describe(), "axes": axes}
    (RESULTS / f"{FILE}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    plot(content)
    print(section(content))


def seconds(samples: Samples, part: str) -> list[float]:
    """Of a part in every round."""
    method, phases = PARTS[part]
    return [sum(times) for times in zip(*(samples[method][phase] for phase in phases), strict=True)]


def exponent(points: Sequence[Mapping[str, Any]], part: str) -> Ratio:
    """The slope of log time over log size, from the medians, and its interval."""
    sizes = [math.log(point["size"]) for point in points]
    times = [seconds(point["samples"], part) for point in points]

    def slope(drawn: Sequence[Sequence[float]]) -> float:
        return linear_regression(sizes, [math.log(median(own)) for own in drawn]).slope

    choose = random.Random(0)
    slopes = sorted(slope([choose.choices(own, k=len(own)) for own in times]) for _ in range(1000))
    return Ratio(slope(times), slopes[25], slopes[974])


def section(content: Mapping[str, Any]) -> str:
    """The table of docs/performance.md."""
    rows = []
    for axis, points in content["axes"].items():
        span = f"{points[0]['size']:g} to {points[-1]['size']:g}"
        rows.append([axis, span, *(str(exponent(points, part)) for part in PARTS)])
    return (
        f"The exponent of a power law through the medians of {ROUNDS} rounds, with its 95 % interval, around a Llama "
        f"of {BASE.depth} layers x {BASE.width}/{BASE.units}, {BASE.fraction:.0%} of the units and {BASE.records} x "
        f"{BASE.tokens} tokens, {BASE.dtype}; {machine.where(content['machine'])} ([plot](growth.png)):\n\n"
        f"{markdown_table(['axis', 'from, to', *PARTS], rows)}\n"
    )


def plot(content: Mapping[str, Any]) -> None:
    """Draws time against size, an axis a panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained")
    panels = figure.subplots(1, len(content["axes"]))
    for panel, (axis, points) in zip(panels, content["axes"].items(), strict=True):
        sizes = [point["size"] for point in points]
        for part in PARTS:
            times = [1e3 * median(seconds(point["samples"], part)) for point in points]
            panel.loglog(sizes, times, marker="o", markersize=3, label=part)
        panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
        panel.minorticks_off()
        panel.set_xlabel(axis)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend(frameon=False, fontsize="small")
    figure.savefig(PLOT, dpi=110)


def table() -> str:
    """The table from the samples that are kept."""
    return section(load(FILE))


if __name__ == "__main__":
    main()
