"""From a model, a forget set and a retain set to an unlearned plain checkpoint with the evidence beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_fast.config import (
    LAYER_LR,
    RETAIN_RATIO,
    CircuitConfig,
    UnlearnConfig,
    default_epochs,
)
from clue_fast.criteria.registry import get_criterion
from clue_fast.data import EncodedRecords, Source, check_encoding, load_further_sets, load_records, load_sets
from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import SettingError
from clue_fast.evaluation import Metrics, check_evaluation, check_retrained
from clue_fast.files import check_output
from clue_fast.localization import check_localization
from clue_fast.objectives import Objective
from clue_fast.ops import choose
from clue_fast.recording import check_strictly
from clue_fast.reporting import results_table
from clue_fast.run import Run
from clue_fast.selection import Selection
from clue_fast.sparse import LayerRate
from clue_fast.trainer.checkpoints import check_saving, check_weights, detach_quantizer, keeping_trained_weights
from clue_fast.trainer.stages import (
    Schedule,
    Stage,
    check_ranked,
    get_schedule,
    make_stages,
    scheduled,
    scheduled_objective,
)
from clue_fast.trainer.training import layer_rate
from clue_fast.trainer.update_scale import Split, split_forget, teaches_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    unseen: Source | None = None,
    real_authors: Source | None = None,
    world_facts: Source | None = None,
    text: str | None = None,
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
    layers: tuple[float, float] | None = UnlearnConfig.layers,
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
    rounds: int = UnlearnConfig.rounds,
    batch_size: int = UnlearnConfig.batch_size,
    retain_ratio: int | None = UnlearnConfig.retain_ratio,
    lower_layers_gb: float = UnlearnConfig.lower_layers_gb,
    packed_tokens: int | None = UnlearnConfig.packed_tokens,
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
        unseen, real_authors, world_facts, text: what else is measured, see ``clue_fast.evaluation.evaluate_model``.
        selection: made before, instead of localizing now.
        alternate: other answers to the forget questions, one each and in their order, for the objectives ``dpo`` and
            ``refusal``; default refusals such as "I don't know".
        criterion, fraction, count, threshold, scope, normalize, categories, circuit, target, kinds, layers, strict,
            permutations, tokens_per_batch: how to localize, see ``clue_fast.config.LocalizeConfig``; with a selection,
            ``strict`` is of the kinds of units that it has, and the others have no use.
        objective, stages, learning_rate, layer_lr, master_weights, stochastic_rounding, epochs, rounds,
            batch_size, retain_ratio, lower_layers_gb, packed_tokens, forget_target, evaluate_every: how to train, see
            ``clue_fast.config.UnlearnConfig``.
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
        {"unseen": unseen, "real_authors": real_authors, "world_facts": world_facts},
        text,
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
    further: Mapping[str, Source | None],
    text: str | None,
    retrained: PreTrainedModel | Mapping[str, Metrics] | None,
    selection: Selection | None,
    alternate: Source | None,
) -> Run:
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
    asked = sets | load_further_sets(sets, **further)
    config = _settled(config, schedule, len(sets["forget"]))
    check_evaluation(asked, {"forget": config.samples}, {"forget": config.relearn})
    split = _split(config, len(sets["forget"]), objective, stages)
    if split is not None and isinstance(retrained, Mapping):
        retrained["forget"].subset(split.reported)  # refuses figures without the values of each record
    read = asked if alternate is None else {**asked, "alternate": load_records(alternate, "alternate")}
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
    run = Run(
        model,
        tokenizer,
        config,
        Path(output_dir),
        {name: encoded[name] for name in sets},
        encoded,
        text,
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
    if config.rounds > 1:
        raise SettingError(
            f"{config.rounds} rounds select anew, and a selection is given already; leave out one of both"
        )
    for name in ("fraction", "count", "threshold", "normalize", "target", "layers"):
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
