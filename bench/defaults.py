"""Where the training defaults of ``unlearn`` come from: settings compared on data that no reported table is made of.

    python -m bench.defaults demo 10      # invented people of seed 10; the tables are of seeds 0 to 2
    python -m bench.defaults tofu 10      # a tenth of TOFU's authors other than those of examples/tofu_small.py

For each setting: what is still answered of the forget set (greedily, in the best of 20 samples, and, of the others,
after ten steps of relearning on six), and what is kept of the recall on records that took part and on records that did
not. The models are trained once and kept in a folder. Results are appended to ``bench/results/defaults.jsonl`` run by
run; what is there already is not run again, so that a search that was interrupted goes on.

``bench/results/defaults_search.jsonl`` holds the runs by which the defaults were chosen, with an earlier form of this
script: the same settings and data, relearning at a rate of 1e-3, sampling by ``generate``.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from bench import machine
from bench.files import DATA
from clue_fast.config import UnlearnConfig
from clue_fast.data import Record
from clue_fast.demo import make_data
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.evaluation import Metrics, evaluate
from clue_fast.objectives import get_objective
from clue_fast.trainer.training import train_selected

RESULTS = Path(__file__).parent / "results" / "defaults.jsonl"
SAMPLES, RELEARNED = 20, 6

BASE: dict[str, Any] = {
    "objective": "undial",
    "parameters": {"strength": 20.0, "retain_weight": 10.0},
    "rate": 1.2,  # over the width of the model
    "steps": 200,
    "retain_ratio": 4,
    "fraction": 0.3,
    "layer_lr": 0.2,
    "criterion": "difference",
}
FORMER = BASE | {"parameters": {"strength": 20.0, "retain_weight": 5.0}, "fraction": 0.1}
SIMNPO = {"objective": "simnpo", "parameters": {"gamma": 1.0, "retain_weight": 1.0}, "steps": 100}
SETTINGS: list[dict[str, Any]] = [
    BASE,
    FORMER | SIMNPO,
    FORMER,
    *(
        BASE | {"parameters": {"strength": 20.0, "retain_weight": weight}, "fraction": fraction}
        for weight, fraction in ((5.0, 0.3), (1.0, 0.3), (10.0, 0.2), (5.0, 0.2), (10.0, 0.1), (1.0, 0.1))
    ),
    *(
        BASE | {"parameters": {"strength": 10.0, "retain_weight": weight}, "fraction": fraction}
        for weight, fraction in ((5.0, 0.3), (10.0, 0.3), (5.0, 0.1))
    ),
    FORMER | {"layer_lr": 1.0},
    FORMER | {"steps": 400},
    BASE | {"objective": "npo", "parameters": {"beta": 0.1}},
    BASE | {"objective": "npo", "parameters": {"beta": 0.5}},
    BASE | {"objective": "wga", "parameters": {}},
    BASE | {"steps": 100},
    *(BASE | {"rate": rate} for rate in (0.6, 2.4)),
    BASE | {"layer_lr": 1.0},
    BASE | {"criterion": "forget_attribution"},
    BASE | {"criterion": "random"},
    *(
        BASE | {"criterion": "attribution", "fraction": fraction, "rate": rate}
        for fraction, rates in ((0.3, (0.73, 1.2, 2.4)), (0.1, (2.1, 4.2)), (0.03, (3.8, 7.6)), (0.01, (6.6, 13.2)))
        for rate in rates
    ),
]


def load_sets(kind: str, seed: int) -> dict[str, list[Record]]:
    """Returns forget, retain and held-out records that take part in no reported table."""
    if kind == "demo":
        data = make_data(seed)
        return {"forget": data.forget, "retain": data.retain, "held_out": data.held_out}
    forget = clue_fast.load_records(DATA / "tofu" / "forget10_perturbed.json", "forget")[:200]
    retain = clue_fast.load_records(DATA / "tofu" / "retain90.json", "retain")
    return {"forget": forget, "retain": retain[1000:1480], "held_out": retain[1480:1600]}


def load_models(
    kind: str, seed: int, sets: dict[str, list[Record]], folder: Path
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns a model that knows all sets, one that never saw the forget set, and their tokenizer."""
    everything = [record for records in sets.values() for record in records]
    tokenizer = train_tokenizer(everything, vocab_size=2048 if kind == "demo" else 4096)
    shape = Shape() if kind == "demo" else Shape(layers=5, width=128, units=384)
    config = TrainConfig() if kind == "demo" else TrainConfig(epochs=40, batch_size=16, lr=3e-3)
    models = []
    for name, records in (("everything", everything), ("retrained", sets["retain"] + sets["held_out"])):
        path = folder / f"{kind}{seed}" / name
        if not path.is_dir():
            train_model(records, tokenizer, shape=shape, config=config, seed=seed).save_pretrained(path)
        models.append(LlamaForCausalLM.from_pretrained(path))
    return models[0], models[1], tokenizer


def unlearn(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    sets: dict[str, list[Record]],
    setting: dict[str, Any],
    seed: int,
) -> LlamaForCausalLM:
    """Returns a copy of a model that has unlearned by a setting."""
    model, batch = copy.deepcopy(model), 8
    forget, retain = sets["forget"], sets["retain"]
    selection = clue_fast.localize(
        model,
        forget,
        retain,
        tokenizer=tokenizer,
        criterion=setting["criterion"],
        fraction=setting["fraction"],
        permutations=0,
        seed=seed,
        progress=False,
    )
    config = UnlearnConfig(
        learning_rate=setting["rate"] / model.config.hidden_size,
        epochs=max(1, round(setting["steps"] / -(-len(forget) // batch))),
        batch_size=batch,
        retain_ratio=setting["retain_ratio"],
        layer_lr=setting["layer_lr"],
        seed=seed,
        progress=False,
    )
    objective = get_objective(setting["objective"], **setting["parameters"])
    sparse, _ = train_selected(model, tokenizer, sets, selection, objective, config)
    sparse.restore()
    return model


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sets: dict[str, list[Record]], seed: int
) -> dict[str, Metrics]:
    """Returns what a model knows of up to 60 forget, 120 retain and all held-out records."""
    looked_at = {"forget": sets["forget"][:60], "retain": sets["retain"][:120], "held_out": sets["held_out"]}
    deep = {"samples": {"forget": SAMPLES}, "relearn": {"forget": RELEARNED}}
    return evaluate(model, tokenizer, looked_at, **deep, seed=seed, progress=False)


def row(title: str, metrics: dict[str, Metrics], before: dict[str, Any]) -> str:
    """Returns one line of the table."""
    forget = metrics["forget"]
    kept = [metrics[name].rouge_recall / before[name]["rouge_recall"] for name in ("retain", "held_out")]
    figures = (forget.answered, forget.answered_in_samples, forget.answered_after_relearning, *kept)
    return "| " + " | ".join([title, *("-" if value is None else f"{value:.3f}" for value in figures)]) + " |"


def title(setting: dict[str, Any]) -> str:
    """Returns what a setting changes of the base."""
    changed = {name: value for name, value in setting.items() if value != BASE[name]}
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "defaults"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("demo", "tofu"))
    parser.add_argument("seed", type=int, help="from 10 on; the reported tables are of seeds 0 to 2")
    parser.add_argument("--models", type=Path, default=Path("defaults"), help="folder of the trained models")
    parser.add_argument("--first", type=int, default=len(SETTINGS), help="only the first so many settings")
    parser.add_argument("--criterion", help="only the settings with that criterion")
    options = parser.parse_args()
    if options.seed < 10:
        parser.error("seeds below 10 are for the reported tables")
    sets = load_sets(options.kind, options.seed)
    model, retrained, tokenizer = load_models(options.kind, options.seed, sets, options.models)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    own = {"kind": options.kind, "seed": options.seed}
    before: dict[str, Any] = {}
    print(f"| setting | answered | best of {SAMPLES} | others, relearned | retain kept | held out kept |")
    print("| - | - | - | - | - | - |")
    wanted = [s for s in SETTINGS[: options.first] if options.criterion in (None, s["criterion"])]
    for setting in ["before", "retrained", *wanted]:
        found = next((run for run in known if run["setting"] == setting and own.items() <= run.items()), None)
        if found is None:
            started = time.perf_counter()
            subject = {"before": model, "retrained": retrained}[setting] if isinstance(setting, str) else None
            subject = subject or unlearn(model, tokenizer, sets, setting, options.seed)
            trained = time.perf_counter() - started
            figures = {name: m.summary() for name, m in measure(subject, tokenizer, sets, options.seed).items()}
            found = {**own, "setting": setting, "figures": figures, "train_s": trained, "machine": machine.describe()}
            with RESULTS.open("a") as file:
                file.write(json.dumps(found) + "\n")
        before = before or found["figures"]
        metrics = {name: Metrics(**values) for name, values in found["figures"].items()}
        print(row(setting if isinstance(setting, str) else title(setting), metrics, before), flush=True)


if __name__ == "__main__":
    main()
