"""Budgets: how many units of which pool may be selected, and scores made comparable between sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clue_fast.errors import BudgetError, UnknownNameError
from clue_fast.sites import Site

SCOPES = ("layer", "kind", "global")
DEFAULT_FRACTION = 0.1
Budget = float | Mapping[str, float]


def check_budget(
    fraction: Budget | None,
    *,
    count: int | Mapping[str, int] | None = None,
    threshold: float | None = None,
    scope: str = "layer",
) -> tuple[str, Any]:
    """Returns the name and value of the one budget given (default a fraction of 0.1). Raises BudgetError."""
    given = {"fraction": fraction, "count": count, "threshold": threshold}
    budgets = {name: value for name, value in given.items() if value is not None} or {"fraction": DEFAULT_FRACTION}
    if len(budgets) > 1:
        raise BudgetError(f"give one budget, not {' and '.join(budgets)}")
    if scope not in SCOPES:
        raise BudgetError(f"unknown scope {scope!r}; choose one of: {', '.join(SCOPES)}")
    ((budget, value),) = budgets.items()
    if isinstance(value, Mapping) and scope == "global":
        raise BudgetError("a budget by kind needs the scope 'layer' or 'kind', since 'global' ranks all kinds together")
    for number in value.values() if isinstance(value, Mapping) else [value]:
        if budget == "fraction" and not 0.0 < number <= 1.0:
            raise BudgetError(f"fraction {number} is outside (0, 1]")
        if budget == "count" and not (number >= 1 and number == int(number)):
            raise BudgetError(f"count {number} is not a whole number above 0")
    return budget, value


def check_normalization(normalize: str | None) -> None:
    """Raises UnknownNameError if there is no such normalization."""
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise UnknownNameError("normalization", normalize, NORMALIZATIONS)


def pools(sites: tuple[Site, ...], budget: str, value: Any, scope: str) -> list[tuple[list[Site], int]]:
    """Returns the sites that are ranked together, and how many units their budget is."""
    together: dict[Any, list[Site]] = {}
    for site in sites:
        together.setdefault({"layer": site, "kind": site.kind, "global": None}[scope], []).append(site)
    if isinstance(value, Mapping):
        unknown = set(value) - {site.kind for site in sites}
        if unknown:
            kinds = ", ".join(sorted({site.kind for site in sites}))
            raise BudgetError(f"no unit is of the kind {sorted(unknown)[0]!r}; the model has: {kinds}")
    found = []
    for pool in together.values():
        own = value.get(pool[0].kind, 0) if isinstance(value, Mapping) else value
        found.append((pool, _budgeted(budget, own, sum(site.width for site in pool)) if own else 0))
    return found


def _budgeted(budget: str, value: float, available: int) -> int:
    if budget == "fraction":
        return max(1, round(value * available))
    if value > available:
        raise BudgetError(f"count {value} is more than the {available} units there are")
    return int(value)


def top(values: Tensor, count: int) -> Tensor:
    """Marks the ``count`` highest values, [units] bool; of equal ones the first."""
    order = torch.sort(values, descending=True, stable=True).indices
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[order[:count]] = True
    return mask


def _ranks(values: Tensor) -> Tensor:
    """Rank within the site as a share of its width, 1 for the highest; equal scores share their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    mean = upper - (counts - 1) / 2
    ranks: Tensor = mean[inverse] / len(values)
    return ranks.float()


def _standardized(values: Tensor) -> Tensor:
    wide = values.double()
    spread = wide.std(correction=0)
    return ((wide - wide.mean()) / spread.clamp_min(torch.finfo(torch.float64).tiny)).float()


NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {"rank": _ranks, "standardize": _standardized}
