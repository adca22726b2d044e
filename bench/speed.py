"""Writes the tables of docs/performance.md from the samples in bench/results, and in bench/results/one_second.

The second are of one run of everything on another processor, with one second of samples to each comparison
(``pytest bench --seconds 1 --results bench/results/one_second --benchmark-json FILE``).

python -m bench.speed
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench import growth
from bench.end_to_end import runs as end_to_end
from bench.files import RESULTS, ROOT, load, write_between
from bench.interleaved import Result
from bench.model.bench_training import Measurement, Point

PAGE = ROOT.parent / "docs" / "performance.md"
BEGIN, END = "<!-- speed -->\n", "<!-- end of speed -->"
ONE_SECOND = RESULTS / "one_second"
HEAD = "| what | ratio | target |\n| --- | ---: | ---: |\n"
# File of results, case, those it is held against, and another to show beside it.
ROWS: list[tuple[Any, ...]] = [
    ("forward", "recording", ["stock"], "hooks"),
    ("forward", "with scores", ["stock", "recording"]),
    ("localize", "localize", ["plain loop"], "loop with hooks"),
    ("gated_activation", "statistics", ["plain"], "eager"),
    ("gated_activation", "moments", ["plain"]),
    ("scoring", "with scores", ["recording"], "two launches"),
    ("sparse_optimizer", "selected", ["whole", "whole with masters"]),
    ("columns_as_rows", "transposed", ["as stored"]),
    ("sparse_linear", "selected", ["dense"]),
    ("channel_statistics", "statistics", ["copy"], "eager"),
    ("conflict_score", "conflict_score", ["eager"]),
]


def where(machine: dict[str, Any]) -> str:
    """Processor and threads, and the clock, if it only counted what the process itself computed."""
    clock = ", processor time on a busy machine" if machine.get("clock") == "processor" else ""
    return f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}{clock}"


def rows(folder: Path, here: str, name: str, case: str, others: list[str], beside: str | None = None) -> Iterator[str]:
    """A row for each comparison and pair of cases that occurs in it; none for what a folder does not have."""
    if not (folder / f"{name}.json").exists():
        return
    kept = load(name, folder)
    elsewhere = "" if where(kept["machine"]) == here else f", on {where(kept['machine'])}"
    for entry in kept["comparisons"]:
        result = Result(entry["title"], entry["samples"])
        for against in others:
            if not {case, against} <= set(entry["samples"]):
                continue
            found = result.ratio(case, against)
            ratio = f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
            if beside is not None:
                ratio += f" ({beside} {result.ratio(beside, against).value:.2f})"
            limits = {t["at_most"] for t in entry["targets"] if (t["case"], t["against"]) == (case, against)}
            target = " or ".join(f"≤ {limit:.3f}".rstrip("0").rstrip(".") for limit in sorted(limits))
            yield f"| {entry['title']}{elsewhere}: {case} / {against} | {ratio} | {target} |\n"


def training_rows(folder: Path) -> Iterator[str]:
    """A row for each point: time of a step, and bytes that the forward saves."""
    for entry in load("training", folder)["points"]:
        measurement = Measurement(Point(**entry["point"]), entry["samples"], entry["bytes"])
        steps, saved = measurement.steps, {method: count["saved"] for method, count in measurement.bytes.items()}
        cells = [f"{steps.ratio('ours', against).value:.2f}" for against in ("full + mask", "LoRA", "SHiRA")]
        cells.append(f"{saved['ours'] / saved['LoRA']:.2f}")
        cells.append(f"{1e3 * median(steps.samples['ours']):.0f} ms")
        yield f"| {measurement.point.name} | {' | '.join(cells)} |\n"


def tables(folder: Path, how: str) -> str:
    """Both tables of a folder of samples."""
    machine = load("forward", folder)["machine"]
    training = load("training", folder)
    point = training["points"][0]["point"]
    model = training["model"]
    return "".join(
        [
            f"Medians over interleaved rounds with their 95 % intervals, {how}, {where(machine)} unless the row says "
            f"otherwise, torch {machine['torch']}:\n\n",
            HEAD,
            *(row for which in ROWS for row in rows(folder, where(machine), *which)),
            f"\nA training step of a Llama of {model['layers']} layers x {model['width']}/{model['units']}, "
            f"{point['fraction']:.0%} of the units of every layer, {point['records']} x {point['tokens']} tokens, "
            f"{point['dtype']}, unless the row says otherwise. Aims: 0.60 of full + mask, 1.00 of LoRA (r = 16) in "
            "time and in what the forward saves:\n\n",
            "| point | step / full + mask | / LoRA | / SHiRA | saved / LoRA | step |\n",
            "| --- | ---: | ---: | ---: | ---: | ---: |\n",
            *training_rows(folder),
        ]
    )


def section() -> str:
    """The tables of whole runs, of both folders, and of growth."""
    commit = load("forward", ONE_SECOND)["machine"]["commit"]
    once = f"one run of all of `make bench` at {commit} with one second of samples to each comparison"
    some = tables(RESULTS, "some ten seconds of samples to each comparison")
    return "\n".join([end_to_end.section(load(end_to_end.FILE)), growth.table(), some, tables(ONE_SECOND, once)])


def main() -> None:
    """Writes the sections."""
    write_between(PAGE, BEGIN, END, section())


if __name__ == "__main__":
    main()
