"""The training of a run: an UnlearnTrainer with a bar on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from clue_fast.data import Record
from clue_fast.deprecated import precision
from clue_fast.evaluation import evaluate
from clue_fast.objectives import Objective
from clue_fast.selection import Selection
from clue_fast.sparse import Sparse
from clue_fast.trainer.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from clue_fast.trainer.trainer import UnlearnTrainer


def train_selected(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Record]],
    selection: Selection,
    objective: Objective,
    settings: Mapping[str, Any],
    *,
    alternate: Sequence[Record] | None,
    stages: Sequence[Stage] | None,
    max_length: int,
    evaluate_every: int,
    progress: bool,
) -> tuple[Sparse, list[dict[str, float]]]:
    """Runs the UnlearnTrainer; returns the still sparse model and the history of its losses and recalls."""
    import tempfile

    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from clue_fast.trainer.trainer import UnlearnTrainer

    with tempfile.TemporaryDirectory() as scratch:
        trainer: UnlearnTrainer = UnlearnTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=scratch,
                learning_rate=settings["learning_rate"],
                num_train_epochs=settings["epochs"],
                per_device_train_batch_size=settings["batch_size"],
                seed=settings["seed"],
                weight_decay=0.0,
                warmup_steps=0.1,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=not progress,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            processing_class=tokenizer,
            forget_dataset=sets["forget"],
            retain_dataset=sets["retain"],
            retain_ratio=settings["retain_ratio"],
            alternate_dataset=alternate,
            selection=selection,
            objective=objective,
            layer_lr=settings["layer_lr"],
            **precision(settings["master"]),
            stages=stages,
            max_length=max_length,
        )
        # Losses go to results.json and its plot; on the terminal there is one bar.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        recalls: list[dict[str, float]] = []
        if progress:
            trainer.add_callback(_progress_bar())
        if evaluate_every:
            trainer.add_callback(_recall_callback(tokenizer, sets, evaluate_every, max_length, recalls))
        try:
            trainer.train()
        except BaseException:
            trainer.sparse.revert()
            trainer.sparse.restore()
            raise
        history = [entry for entry in trainer.state.log_history if "loss" in entry] + recalls
        return trainer.sparse, sorted(history, key=lambda entry: entry["step"])


def _progress_bar() -> TrainerCallback:
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class ProgressBar(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, desc="train", unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return ProgressBar()


def _recall_callback(
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Record]],
    every: int,
    max_length: int,
    recalls: list[dict[str, float]],
) -> TrainerCallback:
    """Appends the ROUGE-L recall of up to 32 records a set to ``recalls``, at the start and every so many steps."""
    from transformers import TrainerCallback

    sample = {name: records[:: max(1, len(records) // 32)][:32] for name, records in sets.items()}

    class RecallCallback(TrainerCallback):
        def measure(self, model: Any, step: int) -> None:
            figures = evaluate(model, tokenizer, sample, max_length=max_length, progress=False)
            recalls.append({"step": step, **{f"{name}_recall": m.rouge_recall for name, m in figures.items()}})

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.measure(kwargs["model"], 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.measure(kwargs["model"], state.global_step)

    return RecallCallback()
