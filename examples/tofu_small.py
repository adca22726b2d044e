"""TOFU in small: a Llama of two million weights learns 40 fictitious authors, then forgets ten of them.

    python examples/tofu_small.py --seed 0 --output tofu

Data: TOFU (Maini et al. 2024, arXiv 2401.06121). Forgotten: forget05, 200 questions. Kept: 600 questions of
retain95; 480 of them, of 24 authors, take part in scoring and training, 120, of six others, in neither. A second
model, trained without the forget set, shows what forgetting should look like; the Kolmogorov-Smirnov test compares
the truth ratios of both. Beside the units that the default criterion selects stand random ones, as many in each layer.

Two processes train the two models side by side, one thread each.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast.config import CRITERION
from clue_fast.data import Record
from clue_fast.demo import FRACTION
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.evaluation import Metrics, forget_quality
from clue_fast.files import check_output
from clue_fast.reporting import evaluation_table, read_metrics

HUB = "locuslab/TOFU"
DATA = Path(os.environ.get("CLUE_FAST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "tofu"
RETAIN, HELD_OUT = slice(0, 480), slice(480, 600)
SHAPE = Shape(layers=5, width=128, units=384)
RECIPE = TrainConfig(epochs=40, batch_size=16, lr=3e-3)
RESULTS = "tofu.json"

logger = logging.getLogger("clue_fast.tofu_small")


def load_tofu(folder: Path) -> dict[str, list[Record]]:
    """Returns the records to forget, with their wrong answers, to retain and held out; from the hub if not here."""

    def load(subset: str) -> list[Record]:
        file = folder / f"{subset}.json"
        return clue_fast.load_records(file if folder.is_dir() else f"{HUB}:{subset}", subset)

    retain = load("retain95")
    return {"forget": load("forget05_perturbed"), "retain": retain[RETAIN], "held_out": retain[HELD_OUT]}


def learn(records: Sequence[Record], tokenizer: PreTrainedTokenizerFast, seed: int, folder: Path) -> None:
    """Trains a model on one thread and saves it; runs in a process of its own."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    model = train_model(
        records, tokenizer, shape=SHAPE, config=RECIPE, seed=seed, progress=False, description=f"learn {folder.name}"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learn_both(
    sets: dict[str, list[Record]], tokenizer: PreTrainedTokenizerFast, seed: int, output: Path
) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """Returns a model that knows everything and one that never saw the forget set."""
    kept = sets["retain"] + sets["held_out"]
    tasks = {output / "everything": sets["forget"] + kept, output / "retrained": kept}
    with ProcessPoolExecutor(len(tasks), multiprocessing.get_context("spawn")) as pool:
        for task in [pool.submit(learn, records, tokenizer, seed, folder) for folder, records in tasks.items()]:
            task.result()
    everything, retrained = (LlamaForCausalLM.from_pretrained(folder) for folder in tasks)
    return everything, retrained


def run(data: Path, output: Path, seed: int) -> str:
    """Learns, unlearns twice (selected units, random units), evaluates; leaves everything in the output folder."""
    started = time.perf_counter()
    check_output(output)
    sets = load_tofu(data)
    tokenizer = train_tokenizer(sets["forget"] + sets["retain"] + sets["held_out"], vocab_size=4096)
    model, retrained = learn_both(sets, tokenizer, seed, output)
    known = clue_fast.evaluate(retrained, tokenizer, sets)
    columns: dict[str, dict[str, Metrics]] = {}
    results = {}
    for criterion in (CRITERION, "random"):
        results[criterion] = clue_fast.unlearn(
            copy.deepcopy(model),
            tokenizer,
            forget=sets["forget"],
            retain=sets["retain"],
            held_out=sets["held_out"],
            retrained=known,
            criterion=criterion,
            fraction=FRACTION,
            seed=seed,
            output_dir=output / criterion,
        ).results
        evaluation = results[criterion]["evaluation"]
        columns.setdefault("before", read_metrics(evaluation["before"]))
        columns[criterion] = read_metrics(evaluation["after"])
    columns["retrained"] = known
    summary = summarize(columns, seed) | {"seconds": round(time.perf_counter() - started, 1)}
    (output / RESULTS).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    weights = results[CRITERION]["weights"]
    return "\n".join(
        [
            evaluation_table({name: {s: m.summary() for s, m in sets.items()} for name, sets in columns.items()}),
            "",
            *(f"{name}: {line}" for name, line in summary["quality"].items()),
            f"weights changed outside the selection: {weights['changed_outside']}",
            f"{time.perf_counter() - started:.0f} s; everything is in {output}",
        ]
    )


def summarize(columns: dict[str, dict[str, Metrics]], seed: int) -> dict:
    """Returns what the README reports of a seed: figures by column, forgotten, kept, and forget quality."""
    before, known = columns["before"], columns["retrained"]
    quality = {}
    for name, metrics in columns.items():
        p_value, distance = forget_quality(metrics["forget"].truth_ratios, known["forget"].truth_ratios)
        kept = {s: metrics[s].rouge_recall / before[s].rouge_recall for s in ("retain", "held_out")}
        quality[name] = (
            f"no longer answered {1 - metrics['forget'].answered:.1%}, recall kept on retain {kept['retain']:.1%} "
            f"and on held out {kept['held_out']:.1%}, truth ratio: KS p = {p_value:.2g}, D = {distance:.3f}"
        )
    figures = {name: {s: m.summary() for s, m in metrics.items()} for name, metrics in columns.items()}
    return {"seed": seed, "figures": figures, "quality": quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with TOFU; from the hub if it does not exist")
    parser.add_argument("--output", type=Path, default=Path("tofu"), help="new folder for the results (default: tofu)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    print(run(options.data, options.output, options.seed))


if __name__ == "__main__":
    main()
