"""The published CLUE on the demo's model: what the command makes of it, from training the model to the table.

    python examples/published_clue.py --seed 0 --output clue

Trains the model of ``clue-fast demo``, and the one that never saw what is forgotten, saves both with the data, and
then runs the command that it prints, ``clue-fast unlearn ... --criterion circuit --stages clue``: circuits decide what
is a forget and what a conflict unit (arXiv 2509.20977), and the published schedule trains them.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path

from clue_fast.cli import main as clue_fast
from clue_fast.demo import make_data
from clue_fast.demo.pretraining import train_model, train_tokenizer
from clue_fast.files import check_output


def make_inputs(folder: Path, seed: int) -> None:
    """Leaves the demo's data, its model and the model that never saw the forget set in a folder."""
    data = make_data(seed)
    tokenizer = train_tokenizer(data.everything)
    for name, records in (("model", data.everything), ("reference", data.retain + data.held_out)):
        model = train_model(records, tokenizer, seed=seed, description=f"learn the {name}")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    data.save(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("clue"), help="new folder for everything (default: clue)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("more", nargs=argparse.REMAINDER, help="further arguments of the command, after --")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    check_output(options.output)
    options.output.mkdir(parents=True, exist_ok=True)
    make_inputs(options.output, options.seed)
    folder = options.output
    sets = [f"--{name}={folder / name.replace('-', '_')}.jsonl" for name in ("forget", "retain", "held-out")]
    published = ["--criterion", "circuit", "--stages", "clue", "--seed", str(options.seed)]
    output = [f"--retrained={folder / 'reference'}", f"--output={folder / 'unlearned'}"]
    more = [argument for argument in options.more if argument != "--"]
    arguments = ["unlearn", str(folder / "model"), *sets, *published, *output, *more]
    print(f"clue-fast {shlex.join(arguments)}", flush=True)
    return clue_fast(arguments)


if __name__ == "__main__":
    sys.exit(main())
