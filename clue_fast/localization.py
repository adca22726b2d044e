"""localize: from a model, forget data and retain data to a selection."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from clue_fast.criteria import CRITERIA, importances, measure, score
from clue_fast.criteria.blocks import PERMUTATIONS, check_permutations, reliability
from clue_fast.criteria.circuit import CircuitSettings, Graph, discover, select_units
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.criteria.circuit.discovery import check_circuit_budget, check_units
from clue_fast.criteria.measure import MEASURED_BY_BLOCKS, TOKENS_PER_BATCH, measure_blocks, measured_sites
from clue_fast.criteria.registry import check_target, get_criterion, get_importance
from clue_fast.data import Record, check_disjoint, load_records
from clue_fast.deprecated import moved
from clue_fast.errors import SelectionError, SettingError
from clue_fast.recording import check_strictly
from clue_fast.reliability import Reliability
from clue_fast.selection import RELIABILITY, Selection, categorize, check_budget, check_normalization, pools, select
from clue_fast.sites import DEFAULT_KINDS, survey
from clue_fast.statistics import Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

CIRCUIT = "circuit"
UNIT_CRITERION = "attribution"
"""Ranks the units inside a node of a circuit."""


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
        criterion: a key of ``CRITERIA``, or ``circuit`` for the logic of circuits.
        fraction, count, threshold, scope, normalize: the budget, see ``select``; default the top 10 % of every layer.
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
    check_criterion(criterion)
    budgeted = check_budget(fraction, count=count, threshold=threshold, scope=scope)
    check_normalization(normalize)
    check_permutations(permutations)
    if target is not None:
        check_target(target)
    if circuit is not None and criterion != CIRCUIT:
        raise SettingError(f"settings of circuits need the criterion {CIRCUIT!r}; {criterion!r} has no use for them")
    kinds = _kinds(criterion, kinds)
    if strict:
        check_strictly(model, kinds, backend)
    else:
        for unmatched in survey(model, kinds).unmatched:
            logger.warning("localize leaves out what looks like a site but is none that is known: %s", unmatched)
    measuring: dict[str, Any] = {
        "tokenizer": tokenizer,
        "target": target,
        "kinds": kinds,
        "max_length": max_length,
        "tokens_per_batch": tokens_per_batch,
        "backend": backend,
        "progress": progress,
    }
    if criterion == CIRCUIT:
        check_circuit_budget(threshold, scope, normalize)
        budget: dict[str, Any] = {"fraction": fraction, "count": count}
        selection = _localize_by_circuits(model, forget, retain, circuit, budget, measuring)
        if permutations:
            selection.source[RELIABILITY] = Reliability(reason="circuits do not come from sums over records").as_dict()
    else:
        if isinstance(retain, Mapping):
            raise SelectionError(f"several retain sets need the criterion {CIRCUIT!r}; {criterion!r} compares two sets")
        if categories:
            get_importance(criterion)
        if count is not None or isinstance(fraction, Mapping):
            pools(measured_sites(model, criterion, kinds=measuring["kinds"], backend=backend), *budgeted, scope)
        budget = {"fraction": fraction, "count": count, "threshold": threshold, "scope": scope, "normalize": normalize}
        ranking = _Ranking(criterion, categories, seed, backend)
        selection = _localize_by_statistics(model, forget, retain, ranking, budget, permutations, measuring)
    selection.source["seed"] = seed
    if target is not None:
        selection.source["target"] = target
    units = sum(site.width for site in selection.sites)
    seconds = time.perf_counter() - started
    logger.info("localize: %d of %d units by %s in %.1f s", len(selection), units, criterion, seconds)
    if selection.reliability is not None:
        logger.info("localize: %s", selection.reliability.sentence)
    return selection


def check_criterion(name: str) -> str:
    """Returns the name of a criterion that ``localize`` takes. Raises UnknownNameError."""
    return name if name == CIRCUIT else get_criterion(name, (*CRITERIA, CIRCUIT)).name


def _kinds(criterion: str, kinds: Iterable[str] | None) -> tuple[str, ...]:
    if kinds is not None:
        return tuple(kinds)
    return (*DEFAULT_KINDS, "projection") if criterion == CIRCUIT else DEFAULT_KINDS


@dataclass(frozen=True)
class _Ranking:
    """How units are ranked, see ``localize``."""

    criterion: str
    categories: bool
    seed: int
    backend: str | None

    def select(self, statistics: Statistics, budget: Mapping[str, Any]) -> Selection:
        """The selection from statistics."""
        if self.categories:
            return categorize(*importances(statistics, self.criterion), **budget)
        return select(score(statistics, self.criterion, seed=self.seed, backend=self.backend), **budget)


def _localize_by_statistics(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    ranking: _Ranking,
    budget: dict[str, Any],
    permutations: int,
    measuring: dict[str, Any],
) -> Selection:
    needs = get_criterion(ranking.criterion).needs
    if permutations and needs in MEASURED_BY_BLOCKS:
        blocks = measure_blocks(model, forget, retain, criterion=ranking.criterion, seed=ranking.seed, **measuring)
        statistics = next(blocks.labelled(blocks.truth[None]))
        selection = ranking.select(statistics, budget)
        if budget["threshold"] is not None:  # under other labels as many units, whatever their scores
            budget = {"count": len(selection), "scope": "global", "normalize": budget["normalize"]}
        found = reliability(blocks, partial(ranking.select, budget=budget), selection, permutations, ranking.seed)
    else:
        statistics = measure(model, forget, retain, criterion=ranking.criterion, **measuring)
        selection = ranking.select(statistics, budget)
        found = Reliability(reason=f"{ranking.criterion} units do not come from sums over records")
    if permutations:
        selection.source[RELIABILITY] = found.as_dict()
    selection.statistics = statistics
    return selection


def _localize_by_circuits(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    settings: CircuitSettings | None,
    budget: dict[str, Any],
    measuring: dict[str, Any],
) -> Selection:
    settings = settings or CircuitSettings()
    target = check_target(measuring["target"] or "log_odds")
    forget_records = load_records(forget, "forget")
    sources = retain if isinstance(retain, Mapping) else {"retain": retain}
    sets: dict[str, list[Record]] = {name: load_records(source, name) for name, source in sources.items()}
    for name, records in sets.items():
        check_disjoint({"forget": forget_records, name: records})
    sites = measured_sites(model, UNIT_CRITERION, kinds=measuring["kinds"], backend=measuring["backend"])
    check_units(Graph(find_architecture(model)), sites, **budget)
    discovery = discover(
        model,
        forget_records,
        sets,
        tokenizer=measuring["tokenizer"],
        settings=settings,
        target=target,
        max_length=measuring["max_length"],
        progress=measuring["progress"],
    )
    logger.info("%s", discovery.table())
    retain_records = [record for records in sets.values() for record in records]
    statistics = measure(model, forget_records, retain_records, criterion=UNIT_CRITERION, **measuring)
    units = importances(statistics, UNIT_CRITERION)
    selection = select_units(discovery, *units, **budget, granularity=settings.granularity)
    selection.statistics = statistics
    return selection


def __getattr__(name: str) -> Any:
    return moved(__name__, name)
