"""From a model, a forget set and a retain set to an unlearned plain checkpoint with the evidence beside it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import clue_fast
from clue_fast.config import (
    DEFAULT_OBJECTIVE,
    LAYER_LR,
    RETAIN_RATIO,
    check_rates,
    check_training,
    default_epochs,
    default_learning_rate,
    described,
)
from clue_fast.criteria.circuit import CircuitSettings
from clue_fast.criteria.registry import get_criterion
from clue_fast.data import Source, check_encoding, load_records, load_sets
from clue_fast.errors import ModelError, NonFiniteError, SettingError
from clue_fast.evaluation import Metrics, check_evaluation, evaluate
from clue_fast.files import check_output, output_folder, save_json
from clue_fast.localization import localize
from clue_fast.objectives import Objective
from clue_fast.ops import choose
from clue_fast.recording import check_strictly
from clue_fast.reliability import PERMUTATIONS, check_permutations
from clue_fast.reporting import RESULTS, results_table, write_plots
from clue_fast.selection import RELIABILITY, Selection, check_budget
from clue_fast.sparse import LayerRate, audit
from clue_fast.trainer.checkpoints import check_saving, detach_quantizer, keeping_trained_weights
from clue_fast.trainer.stages import (
    Stage,
    check_ranked,
    get_schedule,
    get_stages,
    make_stages,
    scheduled,
    scheduled_objective,
)
from clue_fast.trainer.training import train_selected
from clue_fast.trainer.update_scale import REPORTED, holding, shrink_update, split_forget, teaches_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
    strict: bool = False,
    permutations: int = PERMUTATIONS,
    circuit: CircuitSettings | None = None,
    objective: str | Objective | None = None,
    alternate: Source | None = None,
    stages: str | Sequence[Stage] | None = None,
    learning_rate: float | None = None,
    layer_lr: LayerRate | None = None,
    master: str = "fp32",
    epochs: float | None = None,
    batch_size: int = 8,
    retain_ratio: int | None = None,
    forget_target: float | None = None,
    evaluate_every: int = 0,
    samples: int = 0,
    relearn: int = 0,
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
        criterion, fraction, scope, categories, permutations, circuit: see ``localize``.
        strict: see ``localize``; with a selection, of the kinds of units that it has.
        objective: see ``clue_fast.objectives.OBJECTIVES``; default UNDIAL with a strength of 20 and a
            retain weight of 10 (that of the schedule, if stages name one).
        alternate: other answers to the forget questions, one each and in their order, for the objectives ``dpo`` and
            ``refusal``; default refusals such as "I don't know".
        stages: "clue" for the published schedule and the settings that belong to it, unless they are given here (see
            ``clue_fast.trainer.stages.CLUE``), or a sequence of ``Stage``. The selection then needs categories; a
            stage of which it has no units is skipped.
        learning_rate: of the first layer; default see ``default_learning_rate``.
        layer_lr: rate of the last layer over that of the first, geometric in between, or another rate by layer, see
            ``LayerRate``. Default 0.2, or that of the published schedule.
        master: "fp32" or "stochastic", see ``SparseAdamW``.
        epochs: passes over the forget set; default see ``default_epochs``; stages have their own.
        batch_size: forget records a step.
        retain_ratio: retain records beside each forget record. Default 4, or that of the published schedule.
        forget_target: share of the forget questions that shall no longer be answered (ROUGE-L recall below 0.5). Once
            trained, the update is then shrunk to the smallest share of itself that reaches the target on a random half
            of the forget questions and on their rewordings (``paraphrased_question``), see
            ``clue_fast.trainer.shrink``. The other half was not looked at and is reported as a set of its own,
            "forget_reported", with a column before and one after shrinking. It makes up for what was damaged, and for
            that forgets less deeply. None, the default, keeps the whole update.
        evaluate_every: steps between evaluations of forget and retain recall during training, 0 for none.
        samples, relearn: answers to sample to each forget question, and forget records that a copy of the model learns
            again, when it is evaluated; see ``clue_fast.evaluate``.
        seed: of everything that is random.
        max_length: longer records are cut, in tokens, in training and in evaluation.
        backend: forces a backend for recording.
        progress: show progress bars.

    Raises:
        ClueFastError: bad input, see its children; nothing half-written stays behind.
    """
    check_output(output_dir)
    ranking = get_criterion(criterion)
    check_budget(fraction, scope=scope)
    check_permutations(permutations)
    schedule = get_schedule(stages)
    chosen_objective = scheduled_objective(objective, schedule, DEFAULT_OBJECTIVE)
    every = None if stages is None else make_stages(stages, chosen_objective)
    sets = load_sets(forget, retain, held_out)
    training = {
        "learning_rate": default_learning_rate(model) if learning_rate is None else learning_rate,
        "layer_lr": scheduled("layer_lr", layer_lr, schedule, LAYER_LR),
        "epochs": default_epochs(len(sets["forget"]), batch_size) if epochs is None else epochs,
        "batch_size": batch_size,
        "retain_ratio": scheduled("retain_ratio", retain_ratio, schedule, RETAIN_RATIO),
        "forget_target": forget_target,
        "master": master,
        "seed": seed,
    }
    check_training(training)
    if stages is not None and epochs is not None:
        raise SettingError("stages have epochs of their own; leave epochs out")
    if selection is not None and circuit is not None:
        raise SettingError("settings of circuits make a selection, and one is given already; leave out one of both")
    measures = _measures(samples, relearn, seed, max_length, progress)
    check_evaluation(sets, measures["samples"], measures["relearn"])
    split = None if forget_target is None else split_forget(len(sets["forget"]), seed)
    if split is not None and teaches_answers(chosen_objective, every):
        raise SettingError(
            f"forget_target {forget_target} shrinks the update, and with it the other answers that the objective "
            "teaches; leave it out"
        )
    if split is not None and isinstance(reference, Mapping):
        reference["forget"].subset(split.reported)  # refuses figures without the values of each record
    other_answers = None if alternate is None else load_records(alternate, "alternate")
    check_encoding(
        model, sets if other_answers is None else {**sets, "alternate": other_answers}, tokenizer, max_length
    )
    check_weights(model)
    detach_quantizer(model)
    check_saving(model, output_dir, tokenizer)
    choose("gated_activation", model.device, backend)
    if selection is not None:
        selection.check(model)
        if strict:  # otherwise localize checks, before it runs the model over anything
            check_strictly(model, {site.kind for site in selection.sites}, backend)
    kept: tuple[Stage, ...] | None = None
    if every is not None:
        if not (categories or ranking.always_categorizes if selection is None else selection.categorized):
            check_ranked(every)
        kept = None if selection is None else get_stages(every, chosen_objective, selection)
    seconds: dict[str, float] = {}
    evaluation: dict[str, Mapping[str, Metrics]] = {}

    # First, since it refuses what makes no sense before it runs the model over anything.
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
                strict=strict,
                permutations=permutations,
                circuit=circuit,
                seed=seed,
                max_length=max_length,
                backend=backend,
                progress=progress,
            )
        if every is not None and kept is None:
            kept = get_stages(every, chosen_objective, selection)
        check_rates(training["layer_lr"], selection)
    with _stage("evaluate before", seconds):
        evaluation["before"] = evaluate(model, tokenizer, sets, **measures)
    with _stage("train", seconds):
        before = audit.snapshot(model)
        sparse, history = train_selected(
            model,
            tokenizer,
            sets,
            selection,
            chosen_objective,
            training,
            alternate=other_answers,
            stages=kept,
            max_length=max_length,
            evaluate_every=evaluate_every,
            progress=progress,
        )
        trained = sum(parameter.numel() for parameter in sparse.trainable_parameters)
    shrinking: dict[str, Any] = {}
    whole: dict[str, Tensor] = {}
    if split is not None and forget_target is not None:
        with _stage("shrink", seconds):
            now = audit.snapshot(model)
            whole = {name: weight for name, weight in now.items() if not torch.equal(weight, before[name])}
            validation = [sets["forget"][index] for index in split.validation]
            share, unanswered = shrink_update(sparse, model, tokenizer, validation, forget_target, max_length)
            shrinking = {
                "forget_target": forget_target,
                "update_kept": share,
                "unanswered": unanswered,
                "validation": [index + 1 for index in split.validation],
                "reported": [index + 1 for index in split.reported],
                "rewordings": sum(record.paraphrased_prompt is not None for record in validation),
            }
    sparse.restore()
    rate = training["layer_lr"]
    course = {} if every is None or kept is None else described(every, kept, schedule, training, chosen_objective)
    with keeping_trained_weights(model, output_dir):
        with _stage("evaluate after", seconds):
            if split is not None:
                with holding(model, whole):
                    evaluation["trained"] = evaluate(model, tokenizer, sets, **measures)
            evaluation["after"] = evaluate(model, tokenizer, sets, **measures)
            if reference is not None:
                evaluation["reference"] = (
                    reference if isinstance(reference, Mapping) else evaluate(reference, tokenizer, sets, **measures)
                )
            if split is not None:
                for stage, figures in evaluation.items():
                    evaluation[stage] = {REPORTED: figures["forget"].subset(split.reported), **figures}
        results: dict[str, Any] = {
            "clue_fast": clue_fast.__version__,
            "settings": {
                **{name: value for name, value in selection.source.items() if name != RELIABILITY},
                **training,
                "layer_lr": rate if isinstance(rate, int | float) else str(rate),
                "objective": chosen_objective.name,
                **asdict(chosen_objective),
                **course,
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
                **({} if selection.reliability is None else {RELIABILITY: selection.reliability.as_dict()}),
            },
            "weights": {
                "total": sum(parameter.numel() for parameter in model.parameters()),
                "trained": trained,
                "changed_inside": audit.changed_inside(before, model, selection),
                "changed_outside": audit.changed_outside(before, model, selection),
            },
            **({"shrinking": shrinking} if shrinking else {}),
            "history": history,
            "seconds": dict(seconds),
        }
        with _stage("save", seconds), output_folder(output_dir) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            selection.save(folder / "selection.safetensors")
            save_json(folder / RESULTS, results)
            try:
                write_plots(folder, selection, selection.statistics, history)
            except Exception as error:  # pictures of what is in the other files
                logger.warning("the plots could not be written: %s", error)
    return UnlearnResult(selection, results, Path(output_dir))


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Source,
    retain: Source,
    held_out: Source | None = None,
    reference: PreTrainedModel | None = None,
    samples: int = 0,
    relearn: int = 0,
    seed: int = 0,
    max_length: int = 512,
    progress: bool = True,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the figures of a model, and of a reference beside it: ``{"model": {set: figures}, "reference": ...}``.

    Samples are drawn, and records relearned, of the forget set; see ``clue_fast.evaluate``.
    """
    sets = load_sets(forget, retain, held_out)
    measures = _measures(samples, relearn, seed, max_length, progress)
    models = {"model": model} | ({} if reference is None else {"reference": reference})
    return {
        title: {name: m.summary() for name, m in evaluate(one, tokenizer, sets, **measures).items()}
        for title, one in models.items()
    }


def _measures(samples: int, relearn: int, seed: int, max_length: int, progress: bool) -> dict[str, Any]:
    """Arguments of ``evaluate``: how deeply something is forgotten is asked of the forget set alone."""
    depth = {"samples": {"forget": samples}, "relearn": {"forget": relearn}}
    return {**depth, "seed": seed, "max_length": max_length, "progress": progress}


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Times a stage, and logs one line at its end."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    logger.info("%s: %.1f s", name, seconds[name])
