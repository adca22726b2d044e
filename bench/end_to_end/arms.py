"""One arm, part by part, in a process of its own."""

from __future__ import annotations

import copy
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine
from bench.end_to_end.runs import OURS, Setting
from bench.files import DATA


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
    if arm == "floor":
        run_floor(loaded, objective, setting, turns)
        return
    turns.end("load")
    if arm in OURS:
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
        before = snapshot(model, tempfile.gettempdir())
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


class AsItWas:
    """What an objective needs to know of a training, where nothing trains: see ``clue_fast.objectives.original``."""

    def __init__(self) -> None:
        self.original_outputs: dict[Any, Any] = {}

    @contextmanager
    def original(self) -> Iterator[None]:
        yield

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        """All weights stay."""


def run_floor(loaded: Loaded, objective: str, setting: Setting, turns: Turns) -> None:
    """Forward and the gradient of the activations, on the stock model, of whose weights none has one."""
    import torch

    from clue_fast.objectives import get_objective, predict
    from clue_fast.objectives.passes import join

    model, method, as_it_was = loaded.model.train().requires_grad_(False), get_objective(objective), AsItWas()
    with torch.no_grad():
        for batch in loaded.paired(setting):
            method.loss(model, batch, as_it_was)  # keeps what the original says
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    turns.end("load")
    batches = iter(loaded.paired(setting))
    while (batch := next(batches, None)) is not None:
        found = predict(model, batch)
        sum(one.mean(one.losses).mean() for one in found.values()).backward()  # type: ignore[union-attr]
        del found
        turns.end("floor")
        method.loss(model, batch, as_it_was)[0].backward()
        turns.end("floor with the objective")
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
