"""Writes the tables of README.md, docs/results.md and docs/localization.md from the folders that runs have left.

clue-fast demo --output demo                  # also with --seed 1 and 2
python examples/tofu_small.py --output tofu0  # also with --seed 1 and 2
python examples/published_clue.py --output clue
python -m bench.pages --demo demo demo1 demo2 --tofu tofu0 tofu1 tofu2 --published clue/unlearned

What stands outside the marks of a section stays as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clue_fast.reporting import load_results, results_table

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"difference": "selected", "random": "random", "retrained": "(retrained model)"}


def write(page: str, section: str, text: str) -> None:
    """Replaces what stands between the marks of a section."""
    path = ROOT / page
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    path.write_text(before + begin + text.strip("\n") + "\n" + end + rest.partition(end)[2], encoding="utf-8")


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, nargs="+", help="output folders of the demo, seed 0 first")
    parser.add_argument("--tofu", type=Path, nargs="+", help="output folders of examples/tofu_small.py")
    parser.add_argument("--published", type=Path, help="output folder of examples/published_clue.py")
    options = parser.parse_args()
    if options.demo:
        write("README.md", "demo", f"```\n{results_table(load_results(options.demo[0]))}\n```")
        shutil.copyfile(options.demo[0] / "training.png", ROOT / "docs" / "demo.png")
        write("docs/results.md", "seeds of the demo", seeds(options.demo[1:]))
    if options.tofu:
        write("docs/results.md", "tofu in small", tofu(options.tofu))
    if options.published:
        write("docs/localization.md", "published method", f"```\n{results_table(load_results(options.published))}\n```")


if __name__ == "__main__":
    main()
