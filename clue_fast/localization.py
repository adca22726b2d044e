"""From a model, forget data and retain data to a selection of units."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clue_fast.config import CircuitConfig, LocalizeConfig
from clue_fast.criteria import Measured
from clue_fast.criteria.blocks import check_permutations, reliability
from clue_fast.criteria.measure import Task, measure_blocks, measure_task
from clue_fast.criteria.passes import check_target
from clue_fast.criteria.registry import get_criterion
from clue_fast.data import EncodedRecords, Record, Source, load_retain_sets
from clue_fast.deprecated import moved
from clue_fast.errors import SettingError
from clue_fast.internals import give_back_memory
from clue_fast.recording import check_strictly
from clue_fast.reliability import Reliability
from clue_fast.selection import RELIABILITY, Selection
from clue_fast.sites import survey
from clue_fast.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def localize(
    model: PreTrainedModel,
    forget: Source,
    retain: Source | Mapping[str, Source],
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = LocalizeConfig.criterion,
    fraction: float | Mapping[str, float] | None = LocalizeConfig.fraction,
    count: int | Mapping[str, int] | None = LocalizeConfig.count,
    threshold: float | None = LocalizeConfig.threshold,
    scope: str = LocalizeConfig.scope,
    normalize: str | None = LocalizeConfig.normalize,
    categories: bool = LocalizeConfig.categories,
    circuit: CircuitConfig | None = LocalizeConfig.circuit,
    target: str | None = LocalizeConfig.target,
    kinds: Iterable[str] | None = LocalizeConfig.kinds,
    layers: tuple[float, float] | None = LocalizeConfig.layers,
    strict: bool = LocalizeConfig.strict,
    permutations: int = LocalizeConfig.permutations,
    seed: int = LocalizeConfig.seed,
    max_length: int = LocalizeConfig.max_length,
    tokens_per_batch: int = LocalizeConfig.tokens_per_batch,
    backend: str | None = LocalizeConfig.backend,
    progress: bool = LocalizeConfig.progress,
) -> Selection:
    """Selects the units in which forget and retain data conflict.

    Args:
        model: a causal language model with sites, see ``find_sites``. It comes back as it was.
        forget, retain: data sets, see ``clue_fast.data.load_records``. For the criterion ``circuit``, ``retain`` may
            be a mapping of several, by name.
        tokenizer: of the model.
        criterion, fraction, count, threshold, scope, normalize, categories, circuit, target, kinds, layers, strict,
            permutations, seed, max_length, tokens_per_batch, backend, progress: see
            ``clue_fast.config.LocalizeConfig``; ``**vars(LocalizeConfig.load(file))`` gives those of a configuration
            file.

    Returns:
        The selection; its ``statistics`` are what was measured for it.

    Raises:
        DataError: a data set is empty, unreadable, or both share records.
        UnknownNameError: no such criterion, target or normalization.
        BudgetError: the budget is out of range.
        SettingError: another setting is out of range, or settings of circuits are given for another criterion.
        SelectionError: categories are wanted of a criterion that only compares.
        CircuitError: see ``clue_fast.criteria.circuit.discover``.
        SiteError: the model has no sites, or see ``strict``.
        NonFiniteError: weights or activations are NaN or infinite.
    """
    get_criterion(criterion)
    config = LocalizeConfig.of(locals())
    check_localization(config, retain)
    sets = load_retain_sets(forget, retain if isinstance(retain, Mapping) else {"retain": retain})
    encoded = {name: EncodedRecords(records, tokenizer, name) for name, records in sets.items()}
    return localize_records(model, encoded, tokenizer, config)


def check_localization(config: LocalizeConfig, retain: Any = None) -> None:
    """Raises what ``localize`` raises of its settings alone, before anything is read.

    Args:
        config: the settings.
        retain: as it was given, if it is known.
    """
    chosen = get_criterion(config.criterion)
    check_permutations(config.permutations)
    if config.target is not None:
        check_target(config.target)
    if config.layers is not None and chosen.needs == "circuits":
        raise SettingError(
            f"criterion {chosen.name!r} follows circuits through all layers; leave layers out, or choose another one"
        )
    chosen.check(config.budget, retain, config.circuit, config.categories)


def localize_records(
    model: PreTrainedModel,
    sets: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    config: LocalizeConfig,
) -> Selection:
    """Selects the units in which sets of records conflict that are read and known to be disjoint.

    Args:
        model, tokenizer: see ``localize``.
        sets: ``forget`` and the sets to retain, by name.
        config: checked, see ``check_localization``.
    """
    started = time.perf_counter()
    chosen, budget = get_criterion(config.criterion), config.budget
    kinds = chosen.kinds if config.kinds is None else tuple(config.kinds)
    found = survey(model, kinds)
    if config.strict:
        check_strictly(model, kinds, config.backend, found)
    for unmatched in found.unmatched:
        logger.warning("localize leaves out what looks like a site but is none that is known: %s", unmatched)
    found.check()
    if config.layers is not None:
        found = found.between(*config.layers)
    task = Task(
        model=model,
        tokenizer=tokenizer,
        found=found,
        forget=sets["forget"],
        retain={name: records for name, records in sets.items() if name != "forget"},
        criterion=chosen,
        target=config.target,
        settings=config.circuit,
        max_length=config.max_length,
        tokens_per_batch=config.tokens_per_batch,
        backend=config.backend,
        progress=config.progress,
    )
    task.check()
    chosen.check_sites(model, found.sites, budget)
    evidence = chosen.find(task)

    def chosen_from(statistics: Statistics, budget: Mapping[str, Any]) -> Selection:
        return chosen.select(Measured(statistics, config.seed, config.backend, evidence), budget, config.categories)

    if config.permutations and chosen.measurement.by_blocks:
        blocks = measure_blocks(task, config.seed)
        statistics = next(blocks.labelled(blocks.truth[None]))
        selection = chosen_from(statistics, budget)
        if config.threshold is not None:  # under other labels as many units, whatever their scores
            budget = {"count": len(selection), "scope": "global", "normalize": config.normalize}
        again = partial(chosen_from, budget=budget)
        measured = reliability(blocks, again, selection, config.permutations, config.seed)
    else:
        statistics = measure_task(task)
        selection = chosen_from(statistics, budget)
        measured = Reliability(reason=f"{chosen.subject} do not come from sums over records")
    give_back_memory()
    if config.permutations:
        selection.source[RELIABILITY] = measured.as_dict()
    selection.source["seed"] = config.seed
    if config.layers is not None:
        selection.source["layers"] = list(config.layers)
    if config.target is not None:
        selection.source["target"] = config.target
    selection.statistics = statistics
    units = sum(site.width for site in selection.sites)
    seconds = time.perf_counter() - started
    logger.info("localize: %d of %d units by %s in %.1f s", len(selection), units, config.criterion, seconds)
    if selection.reliability is not None:
        logger.info("localize: %s", selection.reliability.sentence)
    return selection


def __getattr__(name: str) -> Any:
    return moved(__name__, name)
