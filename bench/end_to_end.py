"""Times a whole unlearning of a real model against what people run: all weights, and LoRA.

    python -m bench.end_to_end

SmolLM2-135M forgets 40 records of TOFU beside 160 that are to be kept, in steps of as many forget as retain records.
Every arm is a process of its own, so that its peak of memory is its own, and the processes take turns, step by step.
All have the same records in the same order, in float32. None evaluates. Some steps are run, and 200, as many as
``unlearn`` takes, are counted from their medians; those of the first epoch, in which ours asks the original model about
each record, are told apart from later ones.

all weights   transformers' Trainer in the style of open-unlearning (Dorna et al. 2025, arXiv 2506.12618): forget and
              retain batch one after another, each padded to its longest record; the reference is a deep copy
LoRA          the same with peft, r = 8 on all linear layers, and the model without adapters as the reference
ours          localize over all records, in batches of 512 tokens, UnlearnTrainer with the package's defaults, the
              proof that no other weight changed, and the checkpoint
last third    the same with as many units of the last third of the layers; from the second epoch on the layers below
              are skipped
floor         forward and the gradient of the activations on the stock model, over the passes and positions that ours
              runs, and nothing trained; beside it the same with all records in one row, kept apart by a mask, and
              with all padded to the longest and all logits

Raw seconds of every part, and the highest resident set of every process, are kept in ``bench/results/end_to_end.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import machine
from bench.files import DATA, RESULTS
from bench.interleaved import rounds_of

FILE = "end_to_end"
OURS = {"ours": None, "last third": (2 / 3, 1.0)}
"""The part of the layers that units are of."""
ARMS = ("all weights", "LoRA", *OURS, "floor")
OBJECTIVES = ("undial",)
FLOORS = ("floor", "packed floor", "padded floor")
STEPS = 200
"""Of the package's default, to which the seconds of a whole run are extended."""


@dataclass(frozen=True)
class Setting:
    """What is run: how many records there are, and of each set in a step.

    The tokens in a pass of the localization are less than those of a step; the default is for a GPU.
    """

    model: str = "smollm2-135m"
    forget: int = 40
    retain: int = 160
    batch_size: int = 4
    steps: int = 4
    warm_up: int = 2
    fraction: float = 0.01
    rank: int = 8
    tokens_per_batch: int = 512
    seed: int = 0

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return self.forget // self.batch_size

    def steps_of(self, arm: str) -> int:
        """How many steps an arm runs: so many; ours as many in the second epoch, in which no original is asked."""
        return self.steps + (self.epoch if arm in OURS else 0)


@dataclass
class Run:
    """What one process left.

    Attributes:
        parts: name and seconds of each part, in their order: "load", "localize", "prepare", every "step" of the first
            epoch, and every "later step", "save"; of the floor those of ``FLOORS``.
        peaks: bytes, the highest resident set of the process until the end of each part.
    """

    parts: list[tuple[str, float]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes, the highest resident set of the process."""
        return max(self.peaks)

    def seconds(self, name: str) -> list[float]:
        """Of all parts of that name."""
        return [seconds for part, seconds in self.parts if part == name]

    def timed(self, setting: Setting, name: str | None = None) -> list[float]:
        """Of the steps of the last rounds, without those that warm up: the same rounds of every arm and floor."""
        every = self.seconds(name) if name else self.seconds("later step") or self.seconds("step")
        return every[setting.warm_up - setting.steps :]

    def whole(self, setting: Setting) -> float:
        """Seconds of ``STEPS`` steps and all other parts but the loading, with steps of the length of the medians."""
        beside = sum(seconds for name, seconds in self.parts if name not in ("load", "step", "later step"))
        later = median(self.timed(setting))
        first = median(self.seconds("step")) if self.seconds("later step") else later
        return beside + setting.epoch * first + (STEPS - setting.epoch) * later


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("/tmp/models/real"), help="folder of the model, or for it")
    parser.add_argument("--steps", type=int, default=Setting.steps)
    parser.add_argument("--objectives", nargs="+", default=OBJECTIVES)
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{FILE}.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setting = Setting(steps=options.steps)
    if options.worker:
        work(options.worker, options.objectives[0], setting, options.models, options.scratch)
        return
    runs: dict[str, dict[str, Run]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for objective in options.objectives:
            runs[objective] = in_turns(options.arms, objective, setting, options.models, Path(scratch))
            print(table(objective, runs[objective], setting), flush=True)
    machine.use_all_cores()
    kept = {name: {arm: asdict(run) for arm, run in arms.items()} for name, arms in runs.items()}
    content = {"machine": machine.describe(), "setting": asdict(setting), "objectives": kept}
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def in_turns(arms: Sequence[str], objective: str, setting: Setting, models: Path, scratch: Path) -> dict[str, Run]:
    """Runs all arms, one part of one of them at a time."""
    workers = {}
    for arm in arms:
        command = [sys.executable, "-m", "bench.end_to_end", "--worker", arm, "--objectives", objective]
        command += ["--models", str(models), "--scratch", str(scratch), "--steps", str(setting.steps)]
        workers[arm] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    runs = {arm: Run() for arm in arms}

    def turn(arm: str) -> str:
        worker = workers[arm]
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            raise SystemExit(f"{arm} with {objective} ended with exit code {worker.wait()}")
        said = json.loads(line)
        runs[arm].parts.append((said["part"], said["seconds"]))
        runs[arm].peaks.append(said["peak"])
        return str(said["part"])

    for arm in arms:
        last = "load" if arm == "floor" else "prepare"
        while turn(arm) != last:
            pass
    orders = list(rounds_of(list(arms), len(arms)))
    most = max(map(setting.steps_of, arms))
    for number in range(most):
        for arm in orders[number % len(orders)]:
            if number >= most - setting.steps_of(arm):  # all end together
                for _ in FLOORS if arm == "floor" else ("step",):
                    turn(arm)
    for arm in arms:
        if arm != "floor":
            turn(arm)
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()
        worker.wait()
    return runs


def table(objective: str, arms: Mapping[str, Run], setting: Setting) -> str:
    """The arms of an objective, a line each."""
    lines = [f"{objective}: seconds of a step, of a run of {STEPS} steps; MB at most"]
    for arm, run in arms.items():
        for name in FLOORS if arm == "floor" else ("step",):
            seconds = median(run.timed(setting, name if arm == "floor" else None))
            line = f"  {arm if name == 'step' else name:<14}{seconds:>8.3f}"
            if name == "step":
                line += f"{run.whole(setting):>10.1f}{run.peak / 1e6:>10.0f}"
                parts = ((part, sum(run.seconds(part))) for part in ("localize", "prepare", "save"))
                line += "  " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts)
            lines.append(line)
    return "\n".join(lines)


def load_runs(content: Mapping[str, Any]) -> dict[str, dict[str, Run]]:
    """The runs of every objective in a file of results; a localization is made once, with the first."""
    runs = {name: {arm: Run(**run) for arm, run in arms.items()} for name, arms in content["objectives"].items()}
    first = next(iter(runs.values()))
    for arms in runs.values():
        for own, localized in ((arms[arm], first[arm]) for arm in OURS):
            if own is not localized:
                names = [name for name, _ in localized.parts]
                own.parts.append(localized.parts[names.index("localize")])
                own.peaks.append(localized.peaks[names.index("localize")])
    return runs


HEAD = (
    "| arm | a step | / all weights | / LoRA | {steps} steps | / all weights | / LoRA | peak | / all weights | / LoRA |"
)


def section(content: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    setting, about = Setting(**content["setting"]), content["machine"]
    lines = [
        f"A whole unlearning of {setting.model}, {setting.forget} forget and {setting.retain} retain records of TOFU, "
        f"{setting.batch_size} + {setting.batch_size} a step, float32, {about['processor']}, {about['threads']} "
        f"threads, torch {about['torch']}: localization, {STEPS} steps counted from the median of "
        f"{setting.steps - setting.warm_up} behind {setting.warm_up} that warm up, proof and checkpoint; MB of the "
        "highest resident set. Aims: .35 and .40 of all weights in time and memory, .80 of LoRA in time, a step at most"
        " 1.05 of the floor:\n",
    ]
    for objective, arms in load_runs(content).items():
        lines += [f"{HEAD.format(steps=STEPS).replace('arm', f'`{objective}`', 1)}", "| --- |" + " ---: |" * 9]
        others = [arms["all weights"], arms["LoRA"]]
        for arm, run in arms.items():
            for name in FLOORS if arm == "floor" else (arm,):
                times = run.timed(setting, name if arm == "floor" else None)
                ratios = (by_rounds(times, other.timed(setting)) for other in others)
                cells = [name, f"{median(times):.2f} s", *(f"{ratio:.2f}" for ratio in ratios)]
                if arm == "floor":
                    cells += [""] * 6
                else:
                    whole = run.whole(setting)
                    cells += [f"{whole:,.0f} s", *(f"{whole / other.whole(setting):.2f}" for other in others)]
                    cells += [f"{run.peak / 1e6:,.0f} MB", *(f"{run.peak / other.peak:.2f}" for other in others)]
                lines.append(f"| {' | '.join(cells)} |")
        floors = arms["floor"]
        steps = arms["ours"].timed(setting)
        against = (f"{by_rounds(steps, floors.timed(setting, name)):.2f} of the {name}" for name in FLOORS)
        lines.append(f"\nA step of ours takes {', '.join(against)}, by the median of the rounds.\n")
    return "\n".join(lines)


def by_rounds(ours: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios of each round."""
    return median(one / other for one, other in zip(ours, others, strict=True))


# What runs in a process of its own.


class Turns:
    """Says how long each part took, and waits for the next turn."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what else is printed goes elsewhere
        self._wait()

    def end(self, part: str) -> None:
        """Ends a part; the next begins with the next turn."""
        seconds = time.perf_counter() - self._started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self._answers.write(json.dumps({"part": part, "seconds": seconds, "peak": peak}) + "\n")
        self._answers.flush()
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)  # there is no further turn
        self._started = time.perf_counter()


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer and the records."""

    model: Any
    tokenizer: Any
    forget: list[Any]
    retain: list[Any]

    @classmethod
    def of(cls, setting: Setting, models: Path) -> Loaded:
        from clue_fast.data import EncodedRecords, load_records
        from clue_fast.demo.pretrained import load_pretrained

        model, tokenizer = load_pretrained(setting.model, models)
        sets = []
        for name, count in (("forget01", setting.forget), ("retain99", setting.retain)):
            lines = (DATA / "tofu" / f"{name}.json").read_text(encoding="utf-8").splitlines()[:count]
            records = load_records([json.loads(line) for line in lines], name)
            sets.append(EncodedRecords(records, tokenizer, name))
        return cls(model, tokenizer, *sets)

    def paired(self, setting: Setting) -> Any:
        """Batches of a step, in the order that all arms have."""
        from torch.utils.data import DataLoader

        from clue_fast.data import Collator, padding_token
        from clue_fast.trainer.pairing import PairCollator, PairedRecords, PairSampler

        pairs = PairedRecords(self.forget.examples, self.retain.examples)  # type: ignore[attr-defined]
        sampler = PairSampler(len(self.forget), len(self.retain), setting.seed, ratio=1)
        collate = PairCollator(Collator(padding_token(self.tokenizer, self.model)))
        return DataLoader(pairs, batch_size=setting.batch_size, sampler=sampler, collate_fn=collate)


def work(arm: str, objective: str, setting: Setting, models: Path, scratch: Path) -> None:
    """Runs one arm, part by part."""
    import transformers

    machine.use_all_cores()
    transformers.logging.set_verbosity_error()
    turns = Turns()
    loaded = Loaded.of(setting, models)
    turns.end("load")
    if arm == "floor":
        run_floor(loaded, setting, turns)
    elif arm in OURS:
        run_ours(loaded, arm, objective, setting, turns, scratch / f"{arm}.safetensors")
    else:
        run_plain(loaded, arm, objective, setting, turns)


def arguments(arm: str, setting: Setting, output: str) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=output,
        per_device_train_batch_size=setting.batch_size,
        max_steps=setting.steps_of(arm),
        learning_rate=1e-5,
        seed=setting.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not machine.on_gpu(),
    )


def taking_turns(turns: Turns, epoch: int) -> Any:
    """Gives a Trainer a callback that ends a part where a step begins."""
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    class TakingTurns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                turns.end("prepare")
            else:
                turns.end(step_name(state.global_step, epoch))

    def add(trainer: Any) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(TakingTurns())

    return add


def step_name(number: int, epoch: int) -> str:
    """Of the step of a number, from 1 on."""
    return "step" if number <= epoch else "later step"


def run_ours(loaded: Loaded, arm: str, objective: str, setting: Setting, turns: Turns, selection: Path) -> None:
    """Localization, training, proof and checkpoint. A selection that another objective has left is taken."""
    import clue_fast
    from clue_fast.sparse import changed_outside, snapshot

    model, tokenizer = loaded.model, loaded.tokenizer
    if not selection.exists():
        layers = OURS[arm]
        found = clue_fast.localize(
            model,
            loaded.forget,
            loaded.retain,
            tokenizer=tokenizer,
            fraction=setting.fraction / (1.0 if layers is None else layers[1] - layers[0]),
            layers=layers,
            tokens_per_batch=setting.tokens_per_batch,
            progress=False,
        )
        found.save(selection)
        turns.end("localize")
    with tempfile.TemporaryDirectory() as output:
        chosen = clue_fast.Selection.load(selection, model)
        before = snapshot(model)
        trainer = clue_fast.UnlearnTrainer(
            model=model,
            args=arguments(arm, setting, output),
            processing_class=tokenizer,
            forget_dataset=loaded.forget,
            retain_dataset=loaded.retain,
            retain_ratio=1,
            selection=chosen,
            objective=objective,
        )
        taking_turns(turns, setting.epoch)(trainer)
        trainer.train()
        turns.end(step_name(trainer.state.global_step, setting.epoch))
        trainer.sparse.restore()
        assert changed_outside(before, model, chosen) == 0
        trainer.save_model(f"{output}/unlearned")
        turns.end("save")


def run_plain(loaded: Loaded, arm: str, objective: str, setting: Setting, turns: Turns) -> None:
    """All weights or LoRA, with a Trainer as people write it."""
    import torch
    from torch import Tensor
    from torch.nn import functional
    from transformers import Trainer

    from clue_fast.objectives import get_objective

    model: Any = loaded.model.train()
    parameters = get_objective(objective)
    asks_reference = bool(parameters.original_batches)
    reference: Any = None
    if arm == "LoRA":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=setting.rank, target_modules="all-linear"))
    elif asks_reference:
        reference = copy.deepcopy(model).eval()

    @contextmanager
    def original() -> Iterator[Any]:
        with torch.no_grad():
            if reference is not None:
                yield reference
            else:
                with model.disable_adapter():
                    yield model

    def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
        losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        return -losses.sum(-1)

    class PlainTrainer(Trainer):
        def get_train_dataloader(self) -> Any:
            return loaded.paired(setting)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            forget, retain = inputs["forget"], inputs["retain"]
            if asks_reference:
                with original() as before:
                    was = before(**forget).logits
            out = model(**forget)
            if objective == "gradient_difference":
                term = -out.loss
            elif objective == "npo":
                ratio = log_likelihood(out.logits, forget["labels"]) - log_likelihood(was, forget["labels"])
                term = (functional.softplus(parameters.beta * ratio) * 2 / parameters.beta).mean()
            else:
                labels = forget["labels"][:, 1:]
                mask = labels != -100
                hit = functional.one_hot(labels.clamp(min=0), was.shape[-1])
                target = (was[:, :-1] - parameters.strength * hit).softmax(-1)
                losses = functional.cross_entropy(
                    out.logits[:, :-1].transpose(1, 2), target.transpose(1, 2), reduction="none"
                )
                term = (losses * mask).sum() / mask.sum()
            loss = term + parameters.retain_weight * model(**retain).loss
            return (loss, out) if return_outputs else loss

    with tempfile.TemporaryDirectory() as output:
        trainer = PlainTrainer(model=model, args=arguments(arm, setting, output), train_dataset=loaded.forget)
        taking_turns(turns, setting.epoch)(trainer)
        trainer.train()
        turns.end(step_name(trainer.state.global_step, setting.epoch))
        whole = model.merge_and_unload() if arm == "LoRA" else model
        whole.save_pretrained(f"{output}/unlearned")
        turns.end("save")


def run_floor(loaded: Loaded, setting: Setting, turns: Turns) -> None:
    """Forward and the gradient of the activations, on the stock model, of whose weights none has one."""
    from clue_fast.objectives import predict
    from clue_fast.objectives.predictions import join

    model = loaded.model.train().requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    batches = iter(loaded.paired(setting))
    while (batch := next(batches, None)) is not None:
        found = predict(model, batch)
        sum(one.mean(one.losses).mean() for one in found.values()).backward()  # type: ignore[union-attr]
        del found
        turns.end("floor")
        packed_loss(model, join(list(batch.values()))).backward()
        turns.end("packed floor")
        model(**join(list(batch.values())), use_cache=False).loss.backward()
        turns.end("padded floor")


def packed_loss(model: Any, batch: Mapping[str, Any]) -> Any:
    """The mean loss of the answers of records that stand in one row without padding, kept apart by a mask."""
    import torch

    from clue_fast.objectives.predictions import Head, Predictions

    attended = batch["attention_mask"].bool()
    lengths = attended.sum(-1)
    record = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    places = torch.cat([torch.arange(length) for length in lengths.tolist()])
    mask = (record[:, None] == record) & (places[:, None] >= places)
    row, labels = batch["input_ids"][attended][None], batch["labels"][attended].roll(-1)
    labels[lengths.cumsum(0) - 1] = -100
    states = model.base_model(input_ids=row, position_ids=places[None], attention_mask=mask[None, None])[0][0]
    counted = labels != -100
    head = Head(model.get_output_embeddings(), ("cpu", torch.bfloat16, False))
    return Predictions(states[counted], labels[counted], counted[None], head).losses.mean()


if __name__ == "__main__":
    main()
