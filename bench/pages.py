r"""Writes the tables of README.md and of the pages of docs from the folders that runs have left.

clue-fast demo --output demo                  # also with --seed 1 and 2
clue-fast demo --real --output real0          # also with --seed 1 and 2
python examples/tofu_small.py --output tofu0  # also with --seed 1 and 2
python examples/published_clue.py --output clue
python -m bench.pages --demo demo demo1 demo2 --real real0 real1 real2 --tofu tofu0 tofu1 tofu2 \
    --published clue/unlearned

What stands outside the marks of a section stays as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.defaults import RESULTS
from bench.files import write_section
from clue_fast.config import CRITERION
from clue_fast.demo.real import REPORT, tables
from clue_fast.reporting import load_results, results_table

ROOT = Path(__file__).resolve().parents[1]
UNITS = {CRITERION: "selected", "random": "random", "retrained": "(retrained model)"}


def table(folder: Path) -> str:
    """The table of a run, without its times, which depend on what else the machine did."""
    lines = results_table(load_results(folder)).splitlines()
    return "```\n" + "\n".join(line for line in lines if not line.startswith("seconds:")) + "\n```"


def listed(values: Sequence[float]) -> str:
    """Shares as percentages, joined."""
    return " and ".join(f"{value:.1%}" for value in values)


def seeds(folders: Sequence[Path]) -> str:
    """A sentence on the demo with other seeds."""
    runs = [load_results(folder) for folder in folders]
    names = [str(run["settings"]["seed"]) for run in runs]
    columns: dict[str, list[dict[str, Any]]] = {
        name: [run["evaluation"][name] for run in runs] for name in ("before", "after", "retrained")
    }
    kept = {
        name: listed(
            [
                after[name]["rouge_recall"] / before[name]["rouge_recall"]
                for before, after in zip(columns["before"], columns["after"], strict=True)
            ]
        )
        for name in ("retain", "held_out")
    }
    after, retrained = ([sets["forget"] for sets in columns[name]] for name in ("after", "retrained"))
    return (
        f"With seeds {' and '.join(names)} (`clue-fast demo --seed 1`, on one thread), "
        f"{listed([1 - one['answered'] for one in after])} are no longer answered, the best of 20 samples answers "
        f"{listed([one['answered_in_samples'] for one in after])} (retrained models "
        f"{listed([one['answered_in_samples'] for one in retrained])}), recall kept is {kept['retain']} on retain, "
        f"{kept['held_out']} on held out."
    )


def tofu(folders: Sequence[Path]) -> str:
    """The table of TOFU in small, three rows a seed."""
    lines = [
        "| seed | units | no longer answered | accuracy on them | recall kept: retain | held out | KS p, truth ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for folder in folders:
        run = json.loads((folder / "tofu.json").read_text(encoding="utf-8"))
        before = run["figures"]["before"]
        for name, units in UNITS.items():
            sets = run["figures"][name]
            kept = [sets[s]["rouge_recall"] / before[s]["rouge_recall"] for s in ("retain", "held_out")]
            p_value = run["quality"][name].partition("KS p = ")[2].partition(",")[0]
            cells = [f"{1 - sets['forget']['answered']:.1%}", f"{sets['forget']['accuracy']:.2f}"]
            cells += [*(f"{share:.1%}" for share in kept), p_value]
            lines.append(f"| {run['seed']} | {units} | {' | '.join(cells)} |")
    return "\n".join(lines)


def real(folders: Sequence[Path]) -> str:
    """A column for each seed of the demo on a real model."""
    reports = [(load_results(folder), json.loads((folder / REPORT).read_text(encoding="utf-8"))) for folder in folders]
    rows: dict[str, list[str]] = {"": [f"seed {run['settings']['seed']}" for run, _ in reports]}
    rows["forgets the capitals of"] = [
        ", ".join(fact["subject"] for fact in report["facts"]["forget"]) for _, report in reports
    ]
    for title in reports[0][1]["counts"]:
        counts = [report["counts"][title] for _, report in reports]
        rows[f"{title}: still right"] = [f"{after} of {before}" for before, after, _ in counts]
    rows["best of 20 samples, forgotten"] = [
        f"{run['evaluation']['after']['forget']['answered_in_samples']:.0%}" for run, _ in reports
    ]
    rows["answer probability, forgotten"] = [
        " to ".join(f"{run['evaluation'][stage]['forget']['probability']:.2f}" for stage in ("before", "after"))
        for run, _ in reports
    ]
    text = reports[0][1]["perplexity"]["text"]
    rows[f"perplexity on {text}"] = [
        f"{report['perplexity']['before']:.2f} to {report['perplexity']['after']:.2f}" for _, report in reports
    ]
    for name, what in (("forgotten", "forgotten"), ("never_known", "not known before")):
        rows[f"others {what}, once half is relearned"] = [
            f"{report['relearning'][name][0]:.0%} to {report['relearning'][name][1]:.0%}" for _, report in reports
        ]
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join([lines[0], "| --- |" + " --- |" * len(reports), *lines[1:]])


def defaults() -> str:
    """The settings that were run on all three sets of records, from ``bench/results/defaults.jsonl``."""
    runs = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    sets = [("demo", 10), ("demo", 11), ("tofu", 10)]
    by_setting: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for run in runs:
        by_setting.setdefault(json.dumps(run["setting"]), {})[run["kind"], run["seed"]] = run["figures"]
    before = by_setting['"before"']
    lines = [
        "| setting | answered | best of 20 | others, relearned | recall kept: retain | held out |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for text, figures in by_setting.items():
        if set(sets) - figures.keys():
            continue
        cells = [
            " / ".join(f"{figures[own]['forget'][name] or 0.0:.2f}" for own in sets)
            for name in ("answered", "answered_in_samples", "answered_after_relearning")
        ]
        cells += [
            " / ".join(f"{figures[own][name]['rouge_recall'] / before[own][name]['rouge_recall']:.2f}" for own in sets)
            for name in ("retain", "held_out")
        ]
        lines.append(f"| {described(json.loads(text))} | {' | '.join(cells)} |")
    return "Demo 10 / demo 11 / TOFU:\n\n" + "\n".join(lines)


def described(setting: str | dict[str, Any]) -> str:
    """A setting in words."""
    if isinstance(setting, str):
        return setting
    name = {"undial": "UNDIAL", "simnpo": "SimNPO"}.get(setting["objective"], setting["objective"])
    values = ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in setting["parameters"].items())
    return f"{name}, {values}, {setting['fraction']:.0%} of the units, {setting['steps']} steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, nargs="+", help="output folders of the demo, seed 0 first")
    parser.add_argument("--tofu", type=Path, nargs="+", help="output folders of examples/tofu_small.py")
    parser.add_argument("--published", type=Path, help="output folder of examples/published_clue.py")
    parser.add_argument("--real", type=Path, nargs="+", help="output folders of the demo on a real model")
    options = parser.parse_args()
    write_section(ROOT / "docs/results.md", "defaults", defaults())
    if options.demo:
        write_section(ROOT / "README.md", "demo", table(options.demo[0]))
        shutil.copyfile(options.demo[0] / "training.png", ROOT / "docs" / "demo.png")
        write_section(ROOT / "docs/results.md", "seeds of the demo", seeds(options.demo[1:]))
    if options.real:
        report = json.loads((options.real[0] / REPORT).read_text(encoding="utf-8"))
        write_section(ROOT / "docs/real.md", "real demo", "\n\n".join(tables(report)))
        write_section(ROOT / "docs/real.md", "seeds of the real demo", real(options.real))
    if options.tofu:
        write_section(ROOT / "docs/results.md", "tofu in small", tofu(options.tofu))
    if options.published:
        write_section(ROOT / "docs/localization.md", "published method", table(options.published))


if __name__ == "__main__":
    main()
