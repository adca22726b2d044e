"""Writes the tables of docs/performance.md from the samples in bench/results.

python -m bench.speed
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from bench.files import ROOT, load, write_between
from bench.interleaved import Result
from bench.model.bench_training import Measurement, Point

PAGE = ROOT.parent / "docs" / "performance.md"
BEGIN, END = "<!-- speed -->\n", "<!-- end of speed -->"
HEAD = "| what | ratio | target |\n| --- | ---: | ---: |\n"
# File of results -> case, those it is held against, and another to show beside it.
ROWS = {
    "forward": ("recording", ["stock"], "hooks"),
    "localize": ("localize", ["plain loop"], "loop with hooks"),
    "gated_activation": ("statistics", ["plain"], "eager"),
    "sparse_optimizer": ("selected", ["whole", "whole with masters"], None),
    "sparse_linear": ("selected", ["dense"], None),
}


def rows(name: str) -> Iterator[str]:
    """A row for each comparison and pair of cases that occurs in it."""
    case, others, beside = ROWS[name]
    for entry in load(name)["comparisons"]:
        result = Result(entry["title"], entry["samples"])
        for against in others:
            if not {case, against} <= set(entry["samples"]):
                continue
            ratio = f"{result.ratio(case, against).value:.3f}"
            if beside is not None:
                ratio += f" ({beside} {result.ratio(beside, against).value:.2f})"
            limits = {t["at_most"] for t in entry["targets"] if (t["case"], t["against"]) == (case, against)}
            target = " or ".join(f"≤ {limit:.3f}".rstrip("0").rstrip(".") for limit in sorted(limits))
            yield f"| {entry['title']}: {case} / {against} | {ratio} | {target} |\n"


def training_rows() -> Iterator[str]:
    """A row for each point: time of a step, and bytes that the forward saves."""
    for entry in load("training")["points"]:
        measurement = Measurement(Point(**entry["point"]), entry["samples"], entry["bytes"])
        steps, saved = measurement.steps, {method: count["saved"] for method, count in measurement.bytes.items()}
        cells = [f"{steps.ratio('ours', against).value:.2f}" for against in ("full + mask", "LoRA", "SHiRA")]
        cells.append(f"{saved['ours'] / saved['LoRA']:.2f}")
        cells.append(f"{1e3 * median(steps.samples['ours']):.0f} ms")
        yield f"| {measurement.point.name} | {' | '.join(cells)} |\n"


def section() -> str:
    """Both tables."""
    machine = load("forward")["machine"]
    training = load("training")
    point = training["points"][0]["point"]
    model = training["model"]
    return "".join(
        [
            f"Medians over interleaved rounds, {machine['processor']}, {machine['threads']} threads, torch "
            f"{machine['torch']}:\n\n",
            HEAD,
            *(row for name in ROWS for row in rows(name)),
            f"\nA training step of a Llama of {model['layers']} layers x {model['width']}/{model['units']}, "
            f"{point['fraction']:.0%} of the units of every layer, {point['records']} x {point['tokens']} tokens, "
            f"{point['dtype']}, unless the row says otherwise. Aims: 0.60 of full + mask, 1.00 of LoRA (r = 16) in "
            "time and in what the forward saves:\n\n",
            "| point | step / full + mask | / LoRA | / SHiRA | saved / LoRA | step |\n",
            "| --- | ---: | ---: | ---: | ---: | ---: |\n",
            *training_rows(),
        ]
    )


def main() -> None:
    """Writes the section."""
    write_between(PAGE, BEGIN, END, section())


if __name__ == "__main__":
    main()
