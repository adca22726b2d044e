"""The training of a run: an UnlearnTrainer with a bar on the terminal, and what results.json says of its settings."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clue_fast.config import UnlearnConfig
from clue_fast.config.schema import check_rule
from clue_fast.data import Record
from clue_fast.errors import SettingError
from clue_fast.evaluation import evaluate
from clue_fast.objectives import Objective, get_objective
from clue_fast.selection import Selection
from clue_fast.sparse import LayerRate, LinearLayerRate, Sparse
from clue_fast.sparse.layer_rates import layer_scale
from clue_fast.trainer.stages import Schedule, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from clue_fast.trainer.trainer import UnlearnTrainer


def layer_rate(layer_lr: LayerRate | str) -> LayerRate:
    """Returns a rate by layer as it is, or what ``linear:NUMBER`` names."""
    return LinearLayerRate(check_rule(layer_lr)) if isinstance(layer_lr, str) else layer_lr


def check_rates(layer_lr: LayerRate, selection: Selection) -> None:
    """Raises SettingError unless every layer with units to train has a rate."""
    layers = 1 + max(site.layer for site in selection.sites)
    try:
        for site in selection.sites:
            if len(selection.units(site)):
                layer_scale(layer_lr, site.layer, layers)
    except ValueError as error:
        raise SettingError(str(error)) from error


def train_selected(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Sequence[Record]],
    selection: Selection,
    objective: Objective,
    config: UnlearnConfig,
    *,
    alternate: Sequence[Record] | None = None,
    stages: Sequence[Stage] | None = None,
    make_trainer: Callable[..., UnlearnTrainer] | None = None,
) -> tuple[Sparse, list[dict[str, float]]]:
    """Runs the UnlearnTrainer.

    Args:
        model, tokenizer, selection, objective: what trains, and on what.
        sets: the records of ``forget`` and ``retain``; the recall of all sets is measured on the way.
        config: with learning rate, epochs, rate by layer and retain ratio in their places.
        alternate: other answers to the forget questions.
        stages: in place of the objective and the epochs.
        make_trainer: called with the arguments of ``UnlearnTrainer``, all by name; default that class. For one of your
            own below it, or to do something before the first step.

    Returns:
        The still sparse model, and the history of its losses and recalls.
    """
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from clue_fast.trainer.trainer import UnlearnTrainer

    with tempfile.TemporaryDirectory() as scratch:
        trainer: UnlearnTrainer = (make_trainer or UnlearnTrainer)(
            model=model,
            args=config.training_arguments(scratch),
            processing_class=tokenizer,
            forget_dataset=sets["forget"],
            retain_dataset=sets["retain"],
            retain_ratio=config.retain_ratio,
            alternate_dataset=alternate,
            selection=selection,
            objective=objective,
            layer_lr=config.layer_lr,
            master_weights=config.master_weights,
            stochastic_rounding=config.stochastic_rounding,
            stages=stages,
            lower_layers_gb=config.lower_layers_gb,
            packed_tokens=config.packed_tokens,
            max_length=config.max_length,
        )
        # Losses go to results.json and its plot; on the terminal there is one bar.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        recalls: list[dict[str, float]] = []
        if config.progress:
            trainer.add_callback(_progress_bar())
        if config.evaluate_every:
            trainer.add_callback(_recall_callback(tokenizer, sets, config, recalls))
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
    config: UnlearnConfig,
    recalls: list[dict[str, float]],
) -> TrainerCallback:
    """Appends the ROUGE-L recall of up to 32 records per set to ``recalls``, at the start and every so many steps."""
    from transformers import TrainerCallback

    sample = {name: records[:: max(1, len(records) // 32)][:32] for name, records in sets.items()}

    class RecallCallback(TrainerCallback):
        def measure(self, model: Any, step: int) -> None:
            figures = evaluate(model, tokenizer, sample, max_length=config.max_length, progress=False)
            recalls.append({"step": step, **{f"{name}_recall": m.rouge_recall for name, m in figures.items()}})

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.measure(kwargs["model"], 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % config.evaluate_every == 0 or state.global_step == state.max_steps:
                self.measure(kwargs["model"], state.global_step)

    return RecallCallback()


def described(
    every: Sequence[Stage],
    kept: Sequence[Stage],
    schedule: Schedule | None,
    settings: Mapping[str, Any],
    objective: Objective,
) -> dict[str, Any]:
    """The stages of a training as settings, in place of its epochs.

    Args:
        every: all stages that were asked for.
        kept: those that had units to train.
        schedule: the published one that they are of, or None.
        settings, objective: of the run; what the schedule has otherwise is listed as changed.
    """
    stages = [
        {"units": list(stage.units), "objective": get_objective(stage.objective).name, "epochs": stage.epochs}
        for stage in kept
    ]
    found: dict[str, Any] = {
        "stages": stages,
        "skipped_stages": [list(stage.units) for stage in every if stage not in kept],
        "epochs": sum(stage.epochs for stage in kept),
    }
    if schedule is not None:
        values = {**settings, **asdict(objective)}
        found["published"] = {
            "schedule": schedule.name,
            "source": schedule.source,
            "settings": {**schedule.settings, "epochs": [stage.epochs for stage in every]},
            "changed": [name for name, value in schedule.settings.items() if values[name] != value],
        }
    return found
