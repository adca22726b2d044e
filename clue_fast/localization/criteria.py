"""Criteria: formulas from the statistics of a unit to one score. The higher, the sooner the unit is selected.

All of them compare two groups, ``forget`` and ``retain``. E is the mean over the tokens of a group, a the activation
of the unit, p = a·∂f/∂a its first-order effect on f.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clue_fast import ops
from clue_fast.errors import PatchError, UnknownNameError
from clue_fast.selection import Scores
from clue_fast.statistics import DEFAULT_GROUPS, Statistics


@dataclass(frozen=True)
class Criterion:
    """A criterion and what it needs.

    Attributes:
        name: as given to ``score`` and ``localize``.
        formula: in the notation of this module.
        source: paper.
        activations: whether it needs recorded activations at all.
        gradients: whether it needs a·∂f/∂a.
    """

    name: str
    formula: str
    source: str
    activations: bool = True
    gradients: bool = False


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "difference",
            "|E_forget[a] - E_retain[a]| / sqrt((Var_forget[a] + Var_retain[a]) / 2)",
            "standardized mean difference, Cohen 1988; conflict of CLUE, arXiv 2509.20977",
        ),
        Criterion(
            "ratio",
            "E_forget|a| / (E_retain|a| + 0.01)",
            "Pochinkov & Schoots 2024, arXiv 2403.01267",
        ),
        Criterion(
            "attribution",
            "E_forget|p| - E_retain|p|, f the log-odds of the answer token",
            "first-order Taylor importance, Molchanov et al. 2017, arXiv 1611.06440",
            gradients=True,
        ),
        Criterion("random", "uniform in [0, 1), from the seed", "null control", activations=False),
    )
}


def get_criterion(name: str) -> Criterion:
    """Returns a criterion by its name. Raises UnknownNameError."""
    if name not in CRITERIA:
        raise UnknownNameError("criterion", name, CRITERIA)
    return CRITERIA[name]


def score(
    statistics: Statistics, criterion: str = "difference", *, seed: int = 0, backend: str | None = None
) -> Scores:
    """Scores every unit of every site, in one launch.

    Args:
        statistics: with the groups ``forget`` and ``retain`` (not needed by ``random``).
        criterion: a key of ``CRITERIA``.
        seed: of ``random``.
        backend: forces a backend.

    Returns:
        ``{site: [width] float32}``, on the device of the statistics.

    Raises:
        UnknownNameError: no such criterion.
        PatchError: a group was not recorded, or without the gradients that the criterion needs.
        NonFiniteError: the statistics hold NaN or infinity.
    """
    chosen = get_criterion(criterion)
    if chosen.activations:
        _require(statistics, chosen)
        values = ops.conflict_score(
            statistics.values,
            statistics.count,
            statistics.offsets.to(statistics.values.device),
            criterion,
            gradient_statistics=statistics.gradient_values if chosen.gradients else None,
            backend=backend,
        )
    else:
        units = int(statistics.offsets[-1])
        values = torch.rand(units, generator=torch.Generator().manual_seed(seed)).to(statistics.values.device)
    split = torch.split(values, [site.width for site in statistics.sites])
    return Scores(dict(zip(statistics.sites, split, strict=True)), criterion, statistics.fingerprint)


def _require(statistics: Statistics, criterion: Criterion) -> None:
    for row, name in enumerate(DEFAULT_GROUPS):
        if statistics.groups[row] != name or int(statistics.count[row].min()) == 0:
            raise PatchError(
                f"criterion {criterion.name!r} compares forget and retain, and no {name} token was recorded"
            )
    if criterion.gradients and statistics.gradient_values is None:
        raise PatchError(f"criterion {criterion.name!r} needs gradients; record with gradients=True and run backward")
    statistics.check_finite()
