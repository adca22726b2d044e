"""Writes the tables of docs/performance.md from the samples in bench/results, and in bench/results/avx512.

python -m bench.speed
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench import growth, machine
from bench.end_to_end import runs as end_to_end
from bench.files import RESULTS, ROOT, load, markdown_table, write_section
from bench.interleaved import Result
from bench.model.bench_training import Measurement, Point

PAGE = ROOT.parent / "docs" / "performance.md"
EARLIER = RESULTS / "avx512"
"""Samples of earlier commits, on processors of another kind."""


class Rows(NamedTuple):
    """A row for each comparison of a file, and each case it is held against that occurs in it.

    Attributes:
        file: of results.
        case: whose time is the numerator.
        others: those it is held against.
        beside: another case whose ratio stands beside.
    """

    file: str
    case: str
    others: Sequence[str]
    beside: str | None = None


FORWARD = [
    Rows("forward", "recording", ["stock"], "hooks"),
    Rows("forward", "with scores", ["stock", "recording"]),
    Rows("localize", "localize", ["plain loop"], "loop with hooks"),
]
STATISTICS = [
    Rows("gated_activation", "statistics", ["plain"], "eager"),
    Rows("gated_activation", "moments", ["plain"]),
    Rows("scoring", "with scores", ["recording"], "two launches"),
    Rows("channel_statistics", "statistics", ["copy"], "eager"),
    Rows("conflict_score", "conflict_score", ["eager"]),
]
SELECTED = [
    Rows("sparse_linear", "selected", ["dense"]),
    Rows("sparse_optimizer", "selected", ["whole", "whole with masters"]),
    Rows("columns_as_rows", "transposed", ["as stored"]),
]


def having(file: str) -> list[Path]:
    """The folders that have such a file."""
    return [folder for folder in (RESULTS, EARLIER) if (folder / f"{file}.json").exists()]


def ratios_of(rows: Rows, folder: Path) -> dict[str, tuple[str, str]]:
    """By what is compared: the ratio with its interval, and the target. Empty where a folder has no such file."""
    found: dict[str, tuple[str, str]] = {}
    if folder not in having(rows.file):
        return found
    for entry in load(rows.file, folder)["comparisons"]:
        result = Result(entry["title"], entry["samples"])
        for against in rows.others:
            if not {rows.case, against} <= set(entry["samples"]):
                continue
            ratio = str(result.ratio(rows.case, against))
            if rows.beside in entry["samples"]:
                ratio += f" ({rows.beside} {result.ratio(rows.beside, against).value:.2f})"
            limits = {t["at_most"] for t in entry["targets"] if (t["case"], t["against"]) == (rows.case, against)}
            target = " or ".join(f"≤ {limit:.3f}".rstrip("0").rstrip(".") for limit in sorted(limits))
            found[f"{entry['title']}: {rows.case} / {against}"] = ratio, target
    return found


def taken_on(every: Sequence[Rows], folder: Path) -> str:
    """The machines and commits of the samples of some files."""
    machines = [load(rows.file, folder)["machine"] for rows in every if folder in having(rows.file)]
    places, commits = ([*dict.fromkeys(own)] for own in (map(machine.where, machines), (m["commit"] for m in machines)))
    return f"{'; '.join(places)}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}"


def ratios(every: Sequence[Rows]) -> str:
    """The table of some files, of both folders, below the machines they were taken on."""
    table = []
    for rows in every:
        found, earlier = ratios_of(rows, RESULTS), ratios_of(rows, EARLIER)
        for what, (_, target) in (earlier | found).items():
            table.append([what, *(own[what][0] if what in own else "" for own in (found, earlier)), target])
    return (
        f"{taken_on(every, RESULTS)}. Beside it what was measured earlier on processors with AVX-512 "
        f"({taken_on(every, EARLIER)}):\n\n" + markdown_table(["what", "ratio", "with AVX-512", "target"], table)
    )


def training(folder: Path) -> str:
    """A row for each point: time of a step, and bytes that the forward saves."""
    content = load("training", folder)
    rows = []
    for entry in content["points"]:
        measurement = Measurement(Point(**entry["point"]), entry["samples"], entry["bytes"])
        steps, saved = measurement.steps, {method: count["saved"] for method, count in measurement.bytes.items()}
        found = [f"{steps.ratio('ours', against).value:.2f}" for against in ("full + mask", "LoRA", "SHiRA")]
        found.append(f"{saved['ours'] / saved['LoRA']:.2f}")
        found.append(f"{1e3 * median(steps.samples['ours']):.0f} ms")
        rows.append([measurement.point.name, *found])
    model, point = content["model"], content["points"][0]["point"]
    return (
        f"A Llama of {model['layers']} layers x {model['width']}/{model['units']}, {point['fraction']:.0%} of the "
        f"units of every layer, {point['records']} x {point['tokens']} tokens, {point['dtype']}, unless the row says "
        f"otherwise; {machine.where(content['machine'])}. Aims: 0.60 of full + mask, 1.00 of LoRA (r = 16) in time "
        "and in what the forward saves:\n\n"
    ) + markdown_table(["point", "step / full + mask", "/ LoRA", "/ SHiRA", "saved / LoRA", "step"], rows)


SECTIONS: dict[str, Callable[[], str]] = {
    "whole runs": lambda: "\n".join(end_to_end.section(load(end_to_end.FILE, own)) for own in having(end_to_end.FILE)),
    "growth": growth.table,
    "forward": lambda: ratios(FORWARD),
    "statistics": lambda: ratios(STATISTICS),
    "selected weights": lambda: ratios(SELECTED),
    "training": lambda: "\n\n".join(map(training, having("training"))),
}
"""What stands between the marks of a name."""


def main() -> None:
    """Writes the sections."""
    for section, text in SECTIONS.items():
        write_section(PAGE, section, text())


if __name__ == "__main__":
    main()
