"""The whole path: a model, a forget set and a retain set in; an unlearned plain checkpoint, and evidence, out."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import clue_fast
from clue_fast.budget import check_budget
from clue_fast.data import Record, Source, check_disjoint, load_records
from clue_fast.errors import ModelError, NonFiniteError, SettingError, UnknownNameError
from clue_fast.evaluation import ANSWERED, Metrics, evaluate, greedy_answers, rouge_recall
from clue_fast.files import check_output, output_folder, save_json
from clue_fast.localization import check_criterion, localize
from clue_fast.ops import choose
from clue_fast.report import RESULTS, results_table, write_plots
from clue_fast.selection import Selection
from clue_fast.training import audit
from clue_fast.training.layer_rates import LayerRate, layer_scale
from clue_fast.training.objectives import Objective, SimNPO, get_objective
from clue_fast.training.optimizer import MASTERS
from clue_fast.training.shrinking import shrink
from clue_fast.training.sparse import Sparse
from clue_fast.training.stages import Stage, get_stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from clue_fast.training.trainer import UnlearnTrainer

logger = logging.getLogger(__name__)

DEFAULT_OBJECTIVE = SimNPO(gamma=1.0)
"""Forgets no further than it must: a record whose answer has become improbable stops pulling."""

WIDTH_RATE = 1.2
EPOCHS = 10.0
STEPS = 100


@dataclass(frozen=True)
class UnlearnResult:
    """What ``unlearn`` did.

    Attributes:
        selection: the units that were trained.
        results: everything that ``results.json`` holds: settings, evaluation by stage and set, counts of changed
            weights, history of the training, seconds by stage.
        output_dir: where the checkpoint is.
    """

    selection: Selection
    results: dict[str, Any]
    output_dir: Path

    def table(self) -> str:
        """Returns the results as the table that the command prints."""
        return results_table(self.results)


def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Source,
    retain: Source,
    output_dir: str | os.PathLike[str],
    held_out: Source | None = None,
    reference: PreTrainedModel | Mapping[str, Metrics] | None = None,
    selection: Selection | None = None,
    criterion: str = "difference",
    fraction: float | None = None,
    scope: str = "layer",
    categories: bool = False,
    objective: str | Objective = DEFAULT_OBJECTIVE,
    alternate: Source | None = None,
    stages: str | Sequence[Stage] | None = None,
    learning_rate: float | None = None,
    layer_lr: LayerRate = 0.2,
    master: str = "fp32",
    epochs: float | None = None,
    batch_size: int = 8,
    retain_ratio: int = 4,
    forget_target: float | None = 0.9,
    evaluate_every: int = 0,
    seed: int = 0,
    max_length: int = 512,
    backend: str | None = None,
    progress: bool = True,
) -> UnlearnResult:
    """Localizes, trains only the selected units, evaluates, and saves a plain checkpoint with the evidence beside it.

    Args:
        model: a causal language model with sites, see ``find_sites``; its selected weights are changed in place.
        tokenizer: of the model.
        forget, retain: data sets, see ``clue_fast.data.load_records``.
        output_dir: new or empty folder for the checkpoint, ``selection.safetensors``, ``results.json`` and plots. It
            appears when everything has ended well.
        held_out: records that must stay and that take no part in scoring or training; they are only evaluated.
        reference: a model that never saw the forget set, or what ``evaluate`` said of it; only compared with.
        selection: made before, instead of localizing now.
        criterion, fraction, scope, categories: see ``localize``.
        objective: see ``clue_fast.training.OBJECTIVES``; default SimNPO with a margin of 1.
        alternate: other answers to the forget questions, one each and in their order, for the objectives ``dpo`` and
            ``refusal``; default refusals such as "I don't know".
        stages: "clue" for the published schedule, or a sequence of ``Stage``, see ``UnlearnTrainer``; the selection
            then needs categories.
        learning_rate: of the first layer; default see ``default_learning_rate``.
        layer_lr: rate of the last layer over that of the first, geometric in between, or another rate by layer, see
            ``LayerRate``.
        master: "fp32" or "stochastic", see ``SparseAdamW``.
        epochs: passes over the forget set; default see ``default_epochs``; stages have their own.
        batch_size: forget records a step.
        retain_ratio: retain records beside each forget record.
        forget_target: share of the forget questions that must no longer be answered (ROUGE-L recall below 0.5). Once
            trained, the update is shrunk to the smallest share of itself that reaches it, see
            ``clue_fast.training.shrink``; None keeps the whole, and so do objectives that teach other answers.
        evaluate_every: steps between evaluations of forget and retain recall during training, 0 for none.
        seed: of everything that is random.
        max_length: longer records are cut, in tokens.
        backend: forces a backend for recording.
        progress: show progress bars.

    Raises:
        ClueFastError: bad input, see its children; nothing half-written stays behind.
    """
    check_output(output_dir)
    check_criterion(criterion)
    check_budget(fraction, scope=scope)
    chosen_objective = get_objective(objective)
    sets = load_sets(forget, retain, held_out)
    training = {
        "learning_rate": default_learning_rate(model) if learning_rate is None else learning_rate,
        "layer_lr": layer_lr,
        "epochs": default_epochs(len(sets["forget"]), batch_size) if epochs is None else epochs,
        "batch_size": batch_size,
        "retain_ratio": retain_ratio,
        "forget_target": forget_target,
        "master": master,
        "seed": seed,
    }
    _check_training(training)
    if stages is not None and epochs is not None:
        raise SettingError("stages have epochs of their own; leave epochs out")
    other_answers = None if alternate is None else load_records(alternate, "alternate")
    check_weights(model)
    choose("gated_activation", model.device, backend)
    if selection is not None:
        selection.check(model)
    seconds: dict[str, float] = {}
    evaluation: dict[str, Mapping[str, Metrics]] = {}

    with _stage("evaluate before", seconds):
        evaluation["before"] = evaluate(model, tokenizer, sets, progress=progress)
    with _stage("localize", seconds):
        if selection is None:
            selection = localize(
                model,
                sets["forget"],
                sets["retain"],
                tokenizer=tokenizer,
                criterion=criterion,
                fraction=fraction,
                scope=scope,
                categories=categories,
                seed=seed,
                max_length=max_length,
                backend=backend,
                progress=progress,
            )
    with _stage("train", seconds):
        before = audit.snapshot(model)
        schedule = None if stages is None else get_stages(stages, chosen_objective, selection)
        _check_rates(layer_lr, selection)
        sparse, history = _train(
            model,
            tokenizer,
            sets,
            selection,
            chosen_objective,
            training,
            alternate=other_answers,
            stages=schedule,
            max_length=max_length,
            evaluate_every=evaluate_every,
            progress=progress,
        )
        trained = sum(parameter.numel() for parameter in sparse.trainable_parameters)
    with _stage("shrink", seconds):
        share = 1.0
        if forget_target is not None and not _teaches_answers(chosen_objective, schedule):
            share = _shrink(sparse, model, tokenizer, sets["forget"], forget_target)
        sparse.restore()
    with _stage("evaluate after", seconds):
        evaluation["after"] = evaluate(model, tokenizer, sets, progress=progress)
        if reference is not None:
            evaluation["reference"] = (
                reference if isinstance(reference, Mapping) else evaluate(reference, tokenizer, sets, progress=progress)
            )
    results = {
        "clue_fast": clue_fast.__version__,
        "settings": {
            **selection.source,
            **training,
            "layer_lr": layer_lr if isinstance(layer_lr, int | float) else str(layer_lr),
            "objective": chosen_objective.name,
            **asdict(chosen_objective),
            **({} if schedule is None else _described(schedule)),
            "records": {name: len(records) for name, records in sets.items()},
        },
        "evaluation": {
            stage: {name: metrics.as_dict() for name, metrics in figures.items()}
            for stage, figures in evaluation.items()
        },
        "selection": {
            "units": len(selection),
            "of": sum(site.width for site in selection.sites),
            "hash": selection.hash,
        },
        "weights": {
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "trained": trained,
            "changed_inside": audit.changed_inside(before, model, selection),
            "changed_outside": audit.changed_outside(before, model, selection),
            "update_kept": share,
        },
        "history": history,
        "seconds": dict(seconds),
    }
    with _stage("save", seconds), output_folder(output_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        selection.save(folder / "selection.safetensors")
        save_json(folder / RESULTS, results)
        write_plots(folder, selection, selection.statistics, history)
    return UnlearnResult(selection, results, Path(output_dir))


def _train(
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

    from clue_fast.training.trainer import UnlearnTrainer

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
            master=settings["master"],
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
            trainer.add_callback(_recall_callback(tokenizer, sets, evaluate_every, recalls))
        try:
            trainer.train()
        except BaseException:
            trainer.sparse.revert()
            trainer.sparse.restore()
            raise
        history = [entry for entry in trainer.state.log_history if "loss" in entry] + recalls
        return trainer.sparse, sorted(history, key=lambda entry: entry["step"])


def _shrink(
    sparse: Sparse,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    forget: Sequence[Record],
    target: float,
) -> float:
    """Shrinks the update as far as that share of the questions stays unanswered; returns how much of it is kept."""
    answers = [record.completion for record in forget]

    def enough() -> bool:
        recalls = rouge_recall(answers, greedy_answers(model, tokenizer, forget, progress=False))
        return sum(recall < ANSWERED for recall in recalls) >= target * len(recalls)

    try:
        return shrink(sparse, enough)
    except BaseException:
        sparse.revert()
        sparse.restore()
        raise


def _teaches_answers(objective: Objective, stages: Sequence[Stage] | None) -> bool:
    objectives = [objective] if stages is None else [get_objective(stage.objective) for stage in stages]
    return any("alternate" in one.forget_batches for one in objectives)


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
    recalls: list[dict[str, float]],
) -> TrainerCallback:
    """Appends the ROUGE-L recall of up to 32 records a set to ``recalls``, at the start and every so many steps."""
    from transformers import TrainerCallback

    sample = {name: records[:: max(1, len(records) // 32)][:32] for name, records in sets.items()}

    class RecallCallback(TrainerCallback):
        def measure(self, model: Any, step: int) -> None:
            figures = evaluate(model, tokenizer, sample, progress=False)
            recalls.append({"step": step, **{f"{name}_recall": m.rouge_recall for name, m in figures.items()}})

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.measure(kwargs["model"], 0)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % every == 0 or state.global_step == state.max_steps:
                self.measure(kwargs["model"], state.global_step)

    return RecallCallback()


def default_learning_rate(model: PreTrainedModel) -> float:
    """Returns 1.2 / width: 0.006 at a width of 192, 0.0003 at 4096.

    Measured on models of a width of 128 to 192; that it falls with the width is the rule for Adam of Yang et al. 2022
    (arXiv 2203.03466). For a model of another kind it is a place to start from.
    """
    width: int = model.get_input_embeddings().weight.shape[-1]  # type: ignore[index, assignment]
    return WIDTH_RATE / width


def default_epochs(records: int, batch_size: int) -> float:
    """Returns 10, or as many epochs as 100 steps take: a small forget set needs more passes."""
    return max(EPOCHS, float(math.ceil(STEPS / math.ceil(records / max(1, batch_size)))))


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Source,
    retain: Source,
    held_out: Source | None = None,
    reference: PreTrainedModel | None = None,
    progress: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the figures of a model, and of a reference beside it: ``{"model": {set: figures}, "reference": ...}``."""
    sets = load_sets(forget, retain, held_out)
    models = {"model": model} | ({} if reference is None else {"reference": reference})
    return {
        title: {name: m.summary() for name, m in evaluate(one, tokenizer, sets, progress=progress).items()}
        for title, one in models.items()
    }


def load_model(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer from a folder or from the hub, onto the GPU if there is one.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, dtype="auto")
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load the model {name}: {reason[0]} "
            "Name a folder with a Hugging Face checkpoint, or a model of the hub"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer  # type: ignore[arg-type]


def check_weights(model: nn.Module) -> None:
    """Raises NonFiniteError naming the first weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"the weight {name} holds NaN or infinity; load the model again or repair it")


def load_sets(forget: Source, retain: Source, held_out: Source | None = None) -> dict[str, list[Record]]:
    """Reads the data sets of a run. Raises DataError if one cannot be read or forget and retain share records."""
    sets = {"forget": load_records(forget, "forget"), "retain": load_records(retain, "retain")}
    check_disjoint(sets["forget"], sets["retain"])
    if held_out is not None:
        sets["held_out"] = load_records(held_out, "held_out")
    return sets


def _check_training(settings: Mapping[str, Any]) -> None:
    numbers = ["learning_rate", "epochs"]
    if isinstance(settings["layer_lr"], int | float):
        numbers.append("layer_lr")
    for name in numbers:
        if not 0.0 < settings[name] < math.inf:
            raise SettingError(f"{name} {settings[name]} is not a number above 0")
    for name in ("batch_size", "retain_ratio"):
        if not (settings[name] >= 1 and settings[name] == int(settings[name])):
            raise SettingError(f"{name} {settings[name]} is not a whole number above 0")
    target = settings["forget_target"]
    if target is not None and not 0.0 < target <= 1.0:
        raise SettingError(f"forget_target {target} is not a share above 0 and up to 1")
    if settings["master"] not in MASTERS:
        raise UnknownNameError("master", settings["master"], MASTERS)


def _check_rates(layer_lr: LayerRate, selection: Selection) -> None:
    layers = 1 + max(site.layer for site in selection.sites)
    try:
        for site in selection.sites:
            if len(selection.units(site)):
                layer_scale(layer_lr, site.layer, layers)
    except ValueError as error:
        raise SettingError(str(error)) from error


def _described(stages: Sequence[Stage]) -> dict[str, Any]:
    """The stages of a training as settings, in place of its epochs."""
    described = [
        {"units": list(stage.units), "objective": get_objective(stage.objective).name, "epochs": stage.epochs}
        for stage in stages
    ]
    return {"stages": described, "epochs": sum(stage.epochs for stage in stages)}


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Times a stage, and logs one line at its end."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    logger.info("%s: %.1f s", name, seconds[name])
