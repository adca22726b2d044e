"""localize: from a model, forget data and retain data to a selection."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from clue_fast.criteria import CircuitSettings, Measured
from clue_fast.criteria.measure import TOKENS_PER_BATCH, load_task, measure_blocks, measure_task
from clue_fast.criteria.passes import check_target
from clue_fast.criteria.registry import get_criterion
from clue_fast.deprecated import moved
from clue_fast.recording import check_strictly
from clue_fast.reliability import PERMUTATIONS, Reliability, check_permutations, reliability
from clue_fast.selection import RELIABILITY, Selection, check_budget, check_normalization
from clue_fast.sites import survey
from clue_fast.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def localize(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = "difference",
    fraction: float | Mapping[str, float] | None = None,
    count: int | Mapping[str, int] | None = None,
    threshold: float | None = None,
    scope: str = "layer",
    normalize: str | None = None,
    categories: bool = False,
    circuit: CircuitSettings | None = None,
    target: str | None = None,
    kinds: Iterable[str] | None = None,
    strict: bool = False,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    max_length: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    backend: str | None = None,
    progress: bool = True,
) -> Selection:
    """Selects the units in which forget and retain data conflict.

    Args:
        model: a causal language model with sites, see ``find_sites``. It comes back as it was.
        forget, retain: data sets, see ``clue_fast.data.load_records``. For the criterion ``circuit``, ``retain`` may
            be a mapping of several, by name.
        tokenizer: of the model.
        criterion: a key of ``CRITERIA``; ``circuit`` is the logic of circuits.
        fraction, count, threshold, scope, normalize: the budget, see ``select``; default the top 30 % of every layer.
        categories: give every unit one of the four categories, from its importance to each set, instead of ranking
            units by one score; see ``categorize``. The criterion ``circuit`` always does.
        circuit: of the criterion ``circuit``.
        kinds: of units, see ``find_sites``; default the channels of MLPs and experts, with ``circuit`` also the
            projections of heads.
        strict: raise where something looks like a site but is none that is known, or where a gated MLP cannot be
            fused, see ``patch``. Otherwise the log warns of the first, which is left out, and the second is recorded
            through a hook.
        permutations: how often the labels forget and retain of records are exchanged, to say in
            ``Selection.reliability`` whether other labels do as well and whether two halves of the data agree; no
            further pass over the data. 0 says nothing.
        seed: of the criterion ``random``, and of exchanges and halves.
        target, max_length, tokens_per_batch, backend, progress: see ``measure``.

    Returns:
        The selection; its ``statistics`` are what was measured for it.

    Raises:
        DataError: a data set is empty, unreadable, or both share records.
        UnknownNameError: no such criterion, target or normalization.
        BudgetError: the budget is out of range.
        SettingError: permutations are out of range, or settings of circuits are given for another criterion.
        SelectionError: categories are wanted of a criterion that only compares.
        CircuitError: see ``clue_fast.criteria.circuit.discover``.
        SiteError: the model has no sites, or see ``strict``.
        NonFiniteError: weights or activations are NaN or infinite.
    """
    started = time.perf_counter()
    chosen = get_criterion(criterion)
    budget = {"fraction": fraction, "count": count, "threshold": threshold, "scope": scope, "normalize": normalize}
    check_budget(fraction, count=count, threshold=threshold, scope=scope)
    check_normalization(normalize)
    check_permutations(permutations)
    if target is not None:
        check_target(target)
    chosen.check(budget, retain, circuit, categories)
    kinds = chosen.kinds if kinds is None else tuple(kinds)
    found = survey(model, kinds)
    if strict:
        check_strictly(model, kinds, backend, found)
    for unmatched in found.unmatched:
        logger.warning("localize leaves out what looks like a site but is none that is known: %s", unmatched)
    found.check()
    task = load_task(
        model,
        forget,
        retain,
        tokenizer=tokenizer,
        found=found,
        criterion=chosen,
        target=target,
        settings=circuit,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        backend=backend,
        progress=progress,
    )
    task.check()
    chosen.check_sites(model, found.sites, budget)
    evidence = chosen.find(task)

    def chosen_from(statistics: Statistics, budget: Mapping[str, Any]) -> Selection:
        return chosen.select(Measured(statistics, seed, backend, evidence), budget, categories)

    if permutations and chosen.measurement.by_blocks:
        blocks = measure_blocks(task, seed)
        statistics = next(blocks.labelled(blocks.truth[None]))
        selection = chosen_from(statistics, budget)
        if threshold is not None:  # under other labels as many units, whatever their scores
            budget = {"count": len(selection), "scope": "global", "normalize": normalize}
        measured = reliability(blocks, partial(chosen_from, budget=budget), selection, permutations, seed)
    else:
        statistics = measure_task(task)
        selection = chosen_from(statistics, budget)
        measured = Reliability(reason=f"{chosen.subject} do not come from sums over records")
    if permutations:
        selection.source[RELIABILITY] = measured.as_dict()
    selection.source["seed"] = seed
    if target is not None:
        selection.source["target"] = target
    selection.statistics = statistics
    units = sum(site.width for site in selection.sites)
    seconds = time.perf_counter() - started
    logger.info("localize: %d of %d units by %s in %.1f s", len(selection), units, criterion, seconds)
    if selection.reliability is not None:
        logger.info("localize: %s", selection.reliability.sentence)
    return selection


def __getattr__(name: str) -> Any:
    return moved(__name__, name)
