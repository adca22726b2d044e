"""Trains on however many processes it is launched with: ``distributed_run.py FOLDER KIND ...``, one after another.

Every rank writes its weights, masters and what it sent to ``FOLDER/KIND/rank-N.pt``. ``resume`` goes on with ``plain``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).parents[2]))

from clue_fast.trainer.trainer import UnlearnTrainer
from tests.models.small_llama import examples, llama, random_selection

RECORDS = 16


class Traffic(TrainerCallback):
    """Counts the bytes of gradients that a rank sends, and the parameters they belong to."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.parameters: set[int] = set()
        self.trainer: Any = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if not distributed.is_initialized():
            return

        def hook(_, bucket):  # torch reads its annotations
            self.bytes.append(bucket.buffer().nbytes)
            self.parameters |= {id(p) for p in bucket.parameters()}
            work = distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda done: done.value()[0] / distributed.get_world_size())

        self.trainer.model_wrapped.register_comm_hook(None, hook)


def main(root: Path, kind: str) -> None:
    folder = root / kind
    folder.mkdir(exist_ok=True)
    checkpoint = root / "plain" / "run" / "checkpoint-2" if kind == "resume" else None
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model = llama()
    traffic = Traffic()
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        per_device_train_batch_size=8 // ranks,
        num_train_epochs=2,
        learning_rate=1e-3,
        weight_decay=0.1,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        log_level="error",
        gradient_checkpointing=kind == "checkpointing",
    )
    trainer = UnlearnTrainer(
        model,
        arguments,
        forget_dataset=examples(RECORDS, seed=1),
        retain_dataset=examples(RECORDS, seed=2),
        selection=random_selection(model, units=5, forget=4),
        objective="npo",
        stages="clue" if kind == "stages" else None,
        master_weights=kind != "stochastic",
        stochastic_rounding=kind == "stochastic",
        callbacks=[traffic],
    )
    traffic.trainer = trainer
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    rank = trainer.args.process_index
    masters = {p.values_name + p.path: p.values.detach() for p in trainer.sparse.slices if p.has_values}
    own = {id(p): p.nbytes for p in trainer.sparse.trainable_parameters}
    torch.save(
        {
            "weights": {**model.state_dict(), **masters},
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            "sent": sum(traffic.bytes),
            "steps": trainer.state.global_step,
            "selected": sum(own.values()),
            "only_selected": traffic.parameters <= set(own),
            "ranks": trainer.args.world_size,
        },
        folder / f"rank-{rank}.pt",
    )


if __name__ == "__main__":
    for kind in sys.argv[2:]:
        main(Path(sys.argv[1]), kind)
    # Done: a thread of gloo that asks for the interpreter while it ends would abort the process.
    sys.stdout.flush()
    os._exit(0)
