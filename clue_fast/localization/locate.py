"""localize: from a model, forget data and retain data to a selection."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clue_fast.budget import check_budget
from clue_fast.localization.criteria import importances, score
from clue_fast.localization.measure import TOKENS_PER_BATCH, measure
from clue_fast.selection import Selection, categorize, select

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
    target: str | None = None,
    seed: int = 0,
    max_length: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    backend: str | None = None,
    progress: bool = True,
) -> Selection:
    """Selects the units in which forget and retain data conflict.

    Args:
        model: a causal language model with sites, see ``find_sites``. It comes back as it was.
        forget, retain: data sets, see ``clue_fast.data.load_records``.
        tokenizer: of the model.
        criterion: a key of ``CRITERIA``.
        fraction, count, threshold, scope, normalize: the budget, see ``select``; default the top 10 % of every layer.
        categories: give every unit one of the four categories, from its importance to each set, instead of ranking
            units by one score; see ``categorize``.
        seed: of the criterion ``random``.
        target, max_length, tokens_per_batch, backend, progress: see ``measure``.

    Raises:
        DataError: a data set is empty, unreadable, or both share records.
        UnknownNameError: no such criterion or target.
        BudgetError: the budget is out of range.
        SelectionError: categories are wanted of a criterion that only compares.
        SiteError: the model has no sites.
        NonFiniteError: weights or activations are NaN or infinite.
    """
    started = time.perf_counter()
    check_budget(fraction, count=count, threshold=threshold, scope=scope)
    statistics = measure(
        model,
        forget,
        retain,
        tokenizer=tokenizer,
        criterion=criterion,
        target=target,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        backend=backend,
        progress=progress,
    )
    budget: dict[str, Any] = {"count": count, "threshold": threshold, "scope": scope, "normalize": normalize}
    if categories:
        selection = categorize(*importances(statistics, criterion), fraction, **budget)
    else:
        selection = select(score(statistics, criterion, seed=seed, backend=backend), fraction, **budget)
    selection.source["seed"] = seed
    if target is not None:
        selection.source["target"] = target
    units = sum(site.width for site in selection.sites)
    seconds = time.perf_counter() - started
    logger.info("localize: %d of %d units by %s in %.1f s", len(selection), units, criterion, seconds)
    return selection
