"""From a model, a forget set and a retain set to an unlearned plain checkpoint with the evidence beside it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clue_fast.config import (
    LAYER_LR,
    RETAIN_RATIO,
    CircuitConfig,
    UnlearnConfig,
    default_epochs,
    default_learning_rate,
)
from clue_fast.criteria.registry import get_criterion
from clue_fast.data import EncodedRecords, Record, Source, check_encoding, load_records, load_sets
from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import ExtraError, SettingError
from clue_fast.evaluation import Metrics, check_evaluation, check_retrained, evaluate, relate
from clue_fast.files import check_output, output_folder, save_json, tensors_hash
from clue_fast.html_report import REPORT, describe_data, site_counts, write_report
from clue_fast.internals import source_name
from clue_fast.localization import check_localization, localize_records
from clue_fast.objectives import Objective
from clue_fast.ops import choose
from clue_fast.recording import check_strictly
from clue_fast.reporting import RESULTS, results_table, write_model_card, write_plots
from clue_fast.selection import RELIABILITY, Selection
from clue_fast.sparse import LayerRate, Sparse, changed_inside, changed_outside, snapshot
from clue_fast.trainer.checkpoints import check_saving, check_weights, detach_quantizer, keeping_trained_weights
from clue_fast.trainer.stages import (
    Schedule,
    Stage,
    check_ranked,
    get_schedule,
    get_stages,
    make_stages,
    scheduled,
    scheduled_objective,
)
from clue_fast.trainer.training import check_rates, described, layer_rate, train_selected
from clue_fast.trainer.update_scale import REPORTED, Split, holding, scale_to_target, split_forget, teaches_answers
from clue_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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


@renamed_arguments(reference="retrained", master=precision)
def unlearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Source,
    retain: Source,
    output_dir: str | os.PathLike[str],
    held_out: Source | None = None,
    retrained: PreTrainedModel | Mapping[str, Metrics] | None = None,
    selection: Selection | None = None,
    alternate: Source | None = None,
    criterion: str = UnlearnConfig.criterion,
    fraction: float | Mapping[str, float] | None = UnlearnConfig.fraction,
    count: int | Mapping[str, int] | None = UnlearnConfig.count,
    threshold: float | None = UnlearnConfig.threshold,
    scope: str = UnlearnConfig.scope,
    normalize: str | None = UnlearnConfig.normalize,
    categories: bool = UnlearnConfig.categories,
    circuit: CircuitConfig | None = UnlearnConfig.circuit,
    target: str | None = UnlearnConfig.target,
    kinds: Iterable[str] | None = UnlearnConfig.kinds,
    strict: bool = UnlearnConfig.strict,
    permutations: int = UnlearnConfig.permutations,
    tokens_per_batch: int = UnlearnConfig.tokens_per_batch,
    objective: str | Objective | None = UnlearnConfig.objective,
    stages: str | Sequence[Stage] | None = UnlearnConfig.stages,
    learning_rate: float | None = UnlearnConfig.learning_rate,
    layer_lr: LayerRate | str | None = UnlearnConfig.layer_lr,
    master_weights: bool = UnlearnConfig.master_weights,
    stochastic_rounding: bool = UnlearnConfig.stochastic_rounding,
    epochs: float | None = UnlearnConfig.epochs,
    batch_size: int = UnlearnConfig.batch_size,
    retain_ratio: int | None = UnlearnConfig.retain_ratio,
    forget_target: float | None = UnlearnConfig.forget_target,
    evaluate_every: int = UnlearnConfig.evaluate_every,
    samples: int = UnlearnConfig.samples,
    relearn: int = UnlearnConfig.relearn,
    attacks: Iterable[str] | None = UnlearnConfig.attacks,
    metrics: Iterable[str] | None = UnlearnConfig.metrics,
    seed: int = UnlearnConfig.seed,
    max_length: int = UnlearnConfig.max_length,
    backend: str | None = UnlearnConfig.backend,
    progress: bool = UnlearnConfig.progress,
) -> UnlearnResult:
    """Localizes, trains only the selected units, evaluates, and saves a plain checkpoint with the evidence beside it.

    Args:
        model: a causal language model with sites, see ``find_sites``; its selected weights are changed in place.
        tokenizer: of the model.
        forget, retain: data sets, see ``clue_fast.data.load_records``.
        output_dir: new or empty folder for the checkpoint, its model card, ``selection.safetensors``, ``results.json``
            and plots. It appears when everything has ended well.
        held_out: records that must stay and that take no part in scoring or training; they are only evaluated.
        retrained: a model that was trained without the forget set, or what ``evaluate`` said of it; only compared with.
        selection: made before, instead of localizing now.
        alternate: other answers to the forget questions, one each and in their order, for the objectives ``dpo`` and
            ``refusal``; default refusals such as "I don't know".
        criterion, fraction, count, threshold, scope, normalize, categories, circuit, target, kinds, strict,
            permutations, tokens_per_batch: how to localize, see ``clue_fast.config.LocalizeConfig``; with a selection,
            ``strict`` is of the kinds of units that it has, and the others have no use.
        objective, stages, learning_rate, layer_lr, master_weights, stochastic_rounding, epochs, batch_size,
            retain_ratio, forget_target, evaluate_every: how to train, see ``clue_fast.config.UnlearnConfig``.
        samples, relearn, attacks, metrics: how to evaluate, see ``clue_fast.config.EvalConfig``.
        seed, max_length, backend, progress: of everything. ``**vars(UnlearnConfig.load(file))`` gives all settings of
            a configuration file.

    Raises:
        ClueFastError: bad input, see its children; nothing half-written stays behind.
    """
    check_output(output_dir)
    run = _prepared(
        model,
        tokenizer,
        UnlearnConfig.of(locals()),
        output_dir,
        (forget, retain, held_out),
        retrained,
        selection,
        alternate,
    )
    run.localize()
    run.evaluate("before")
    run.train()
    run.scale()
    run.sparse.restore()
    with keeping_trained_weights(model, output_dir):
        run.evaluate_trained()
        results = run.results()
        run.save(results)
    return UnlearnResult(run.selected, results, Path(output_dir))


def _prepared(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: UnlearnConfig,
    output_dir: str | os.PathLike[str],
    sources: tuple[Source, Source, Source | None],
    retrained: PreTrainedModel | Mapping[str, Metrics] | None,
    selection: Selection | None,
    alternate: Source | None,
) -> _Run:
    """Reads the data sets, settles every setting, and refuses what makes no sense before the model runs over data."""
    ranking = get_criterion(config.criterion)
    if selection is None:
        check_localization(config)
    else:
        _check_unused(config)
    schedule = get_schedule(config.stages)
    objective = scheduled_objective(config.objective, schedule)
    stages = None if config.stages is None else make_stages(config.stages, objective)
    sets = load_sets(*sources)
    config = _settled(config, schedule, len(sets["forget"]))
    check_evaluation(sets, {"forget": config.samples}, {"forget": config.relearn})
    split = _split(config, len(sets["forget"]), objective, stages)
    if split is not None and isinstance(retrained, Mapping):
        retrained["forget"].subset(split.reported)  # refuses figures without the values of each record
    read = sets if alternate is None else {**sets, "alternate": load_records(alternate, "alternate")}
    encoded = {name: EncodedRecords(records, tokenizer, name) for name, records in read.items()}
    check_encoding(model, encoded, tokenizer, config.max_length)
    others = encoded.pop("alternate", None)
    if isinstance(retrained, Mapping):
        check_retrained(encoded, retrained)
    check_weights(model)
    detach_quantizer(model)
    check_saving(model, output_dir, tokenizer)
    choose("gated_activation", model.device, config.backend)
    if selection is not None:
        selection.check(model)
        if config.strict:  # otherwise localizing checks, before it runs the model over anything
            check_strictly(model, {site.kind for site in selection.sites}, config.backend)
    if stages is not None:
        categorized = config.categories or ranking.always_categorizes if selection is None else selection.categorized
        if not categorized:
            check_ranked(stages)
    run = _Run(
        model,
        tokenizer,
        config,
        Path(output_dir),
        encoded,
        others,
        retrained,
        objective,
        schedule,
        stages,
        split,
        selection,
    )
    if selection is not None:
        run.keep_stages(selection)
    return run


def _check_unused(config: UnlearnConfig) -> None:
    """Raises SettingError for a setting of a localization where a selection is given already."""
    if config.circuit is not None:
        raise SettingError("settings of circuits make a selection, and one is given already; leave out one of both")
    for name in ("fraction", "count", "threshold", "normalize", "target"):
        if getattr(config, name) is not None:
            raise SettingError(f"{name} makes a selection, and one is given already; leave out {name} or the selection")


def _settled(config: UnlearnConfig, schedule: Schedule | None, records: int) -> UnlearnConfig:
    """The settings with every default of the training in its place but the learning rate, which needs the selection.

    Stages, which have epochs of their own, are out.
    """
    epochs = config.epochs
    return replace(
        config,
        stages=None,
        layer_lr=layer_rate(scheduled("layer_lr", config.layer_lr, schedule, LAYER_LR)),
        epochs=default_epochs(records, config.batch_size) if epochs is None else epochs,
        retain_ratio=scheduled("retain_ratio", config.retain_ratio, schedule, RETAIN_RATIO),
    )


def _split(config: UnlearnConfig, records: int, objective: Objective, stages: Sequence[Stage] | None) -> Split | None:
    """How the forget records are split, half to decide on the scale of the update, half to report; None without."""
    if config.forget_target is None:
        return None
    split = split_forget(records, config.seed)
    if teaches_answers(objective, stages):
        raise SettingError(
            f"forget_target {config.forget_target} scales the update down, and with it the other answers that the "
            "objective teaches; leave it out"
        )
    return split


@dataclass
class _Run:
    """The stages of ``unlearn``, one after another, and what each leaves to the next.

    Attributes:
        config: with every setting of the training settled, see ``_settled``.
        sets: the records of ``forget``, ``retain`` and, where there are any, ``held_out``.
        others: other answers to the forget questions.
        retrained: a model to compare with, or what was measured of it.
        schedule, stages: the published schedule, and all stages that were asked for.
        split: of the forget records, where the update is scaled to a target.
        selection: what trains.
        kept: the stages that have units to train.
        evaluation: figures by stage ("before", "trained", "after", "retrained") and set.
        seconds: by stage.
        before: the weights before the training.
        whole: the weights that the training changed, before the update was scaled.
        scaling: how the update was scaled, as the results have it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: UnlearnConfig
    output_dir: Path
    sets: Mapping[str, list[Record]]
    others: list[Record] | None
    retrained: PreTrainedModel | Mapping[str, Metrics] | None
    objective: Objective
    schedule: Schedule | None
    stages: tuple[Stage, ...] | None
    split: Split | None
    selection: Selection | None
    kept: tuple[Stage, ...] | None = None
    evaluation: dict[str, Mapping[str, Metrics]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    scaling: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    trained: int = 0

    sparse: Sparse = field(init=False)

    @property
    def selected(self) -> Selection:
        """The selection, once there is one."""
        assert self.selection is not None
        return self.selection

    def keep_stages(self, selection: Selection) -> None:
        """Keeps the stages that a selection has units for."""
        if self.stages is not None and self.kept is None:
            self.kept = get_stages(self.stages, self.objective, selection)

    def localize(self) -> None:
        """Selects units unless that was done before; the first stage, since it refuses what makes no sense early."""
        with _stage("localize", self.seconds):
            if self.selection is None:
                sets = {name: self.sets[name] for name in ("forget", "retain")}
                self.selection = localize_records(self.model, sets, self.tokenizer, self.config)
            self.keep_stages(self.selection)
            if self.config.learning_rate is None:
                share = max(1, len(self.selection)) / max(1, sum(site.width for site in self.selection.sites))
                self.config = replace(self.config, learning_rate=default_learning_rate(self.model, share))
            check_rates(self.config.layer_lr, self.selection)

    def evaluate(self, stage: str) -> None:
        """Measures the model as it is."""
        with _stage(f"evaluate {stage}", self.seconds):
            self.evaluation[stage] = self._measured(self.model)

    def _measured(self, model: PreTrainedModel) -> dict[str, Metrics]:
        return evaluate(model, self.tokenizer, self.sets, **self.config.measures)

    def train(self) -> None:
        """Trains the selected units; the model stays sparse."""
        with _stage("train", self.seconds):
            self.before = snapshot(self.model)
            self.sparse, self.history = train_selected(
                self.model,
                self.tokenizer,
                self.sets,
                self.selected,
                self.objective,
                self.config,
                alternate=self.others,
                stages=self.kept,
            )
            self.trained = sum(parameter.numel() for parameter in self.sparse.trainable_parameters)

    def scale(self) -> None:
        """Scales the update down to what the target takes, where there is one."""
        if self.split is None or self.config.forget_target is None:
            return
        with _stage("scale", self.seconds):
            now = snapshot(self.model)
            self.whole = {name: weight for name, weight in now.items() if not torch.equal(weight, self.before[name])}
            validation = [self.sets["forget"][index] for index in self.split.validation]
            scale, unanswered = scale_to_target(
                self.sparse, self.model, self.tokenizer, validation, self.config.forget_target, self.config.max_length
            )
            self.scaling = {
                "forget_target": self.config.forget_target,
                "update_scale": scale,
                "unanswered": unanswered,
                "validation": [index + 1 for index in self.split.validation],
                "reported": [index + 1 for index in self.split.reported],
                "rewordings": sum(record.paraphrased_prompt is not None for record in validation),
            }

    def evaluate_trained(self) -> None:
        """Measures the trained model, as it was before its update was scaled too, and the retrained one."""
        with _stage("evaluate after", self.seconds):
            if self.split is not None:
                with holding(self.model, self.whole):
                    self.evaluation["trained"] = self._measured(self.model)
            self.evaluation["after"] = self._measured(self.model)
            if self.retrained is not None:
                known = self.retrained
                figures = known if isinstance(known, Mapping) else self._measured(known)
                self.evaluation = {stage: relate(own, figures) for stage, own in self.evaluation.items()}
                self.evaluation["retrained"] = figures
            if self.split is not None:
                for stage, figures in self.evaluation.items():
                    self.evaluation[stage] = {REPORTED: figures["forget"].subset(self.split.reported), **figures}

    def results(self) -> dict[str, Any]:
        """Everything that ``results.json`` holds."""
        selection, reliability = self.selected, self.selected.reliability
        weights = dict(self.model.named_parameters())
        return {
            "clue_fast": __version__,
            "settings": self._settings(),
            **describe_data(self.sets),
            "evaluation": {
                stage: {name: metrics.as_dict() for name, metrics in figures.items()}
                for stage, figures in self.evaluation.items()
            },
            "selection": {
                "units": len(selection),
                "of": sum(site.width for site in selection.sites),
                "hash": selection.hash,
                "sites": site_counts(selection),
                **({} if reliability is None else {RELIABILITY: reliability.as_dict()}),
            },
            "weights": {
                "total": sum(weight.numel() for weight in weights.values()),
                "trained": self.trained,
                "changed_inside": changed_inside(self.before, self.model, selection),
                "changed_outside": changed_outside(self.before, self.model, selection),
                "hash": {
                    "before": tensors_hash({name: self.before[name] for name in weights}),
                    "after": tensors_hash(weights),
                },
            },
            **({"scaling": self.scaling} if self.scaling else {}),
            "history": self.history,
            "seconds": dict(self.seconds),
        }

    def _settings(self) -> dict[str, Any]:
        config, rate = self.config, self.config.layer_lr
        training = {name: getattr(config, name) for name in TRAINING}
        course: dict[str, Any] = {}
        if self.stages is not None and self.kept is not None:
            course = described(self.stages, self.kept, self.schedule, training, self.objective)
        return {
            **{name: value for name, value in self.selected.source.items() if name != RELIABILITY},
            **training,
            "layer_lr": rate if isinstance(rate, int | float) else str(rate),
            "objective": self.objective.name,
            **asdict(self.objective),
            **course,
            "records": {name: len(records) for name, records in self.sets.items()},
        }

    def save(self, results: Mapping[str, Any]) -> None:
        """Writes the checkpoint, its model card, the selection, the results, their report and the plots."""
        with _stage("save", self.seconds), output_folder(self.output_dir) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.selected.save_pretrained(folder)
            save_json(folder / RESULTS, results)
            write_report(folder / REPORT, {self.output_dir.name: results})
            write_model_card(folder, results, source_name(self.model), self.output_dir.name)
            try:
                write_plots(folder, self.selected, self.selected.statistics, self.history)
            except ExtraError as error:
                logger.warning("no plots: %s", error)
            except Exception as error:  # pictures of what is in the other files
                logger.warning("the plots could not be written: %s", error)


TRAINING = (
    "learning_rate",
    "layer_lr",
    "epochs",
    "batch_size",
    "retain_ratio",
    "forget_target",
    "master_weights",
    "stochastic_rounding",
    "seed",
)
"""Settings of a training as the results have them."""


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Times a stage, and logs one line at its end."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
    logger.info("%s: %.1f s", name, seconds[name])
