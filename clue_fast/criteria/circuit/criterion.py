"""The criterion ``circuit``: the published CLUE, as ``localize`` finds it in the registry of criteria."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clue_fast.config import CircuitConfig
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.criteria.circuit.discovery import (
    Discovery,
    check_circuit_budget,
    check_units,
    discover,
    select_units,
)
from clue_fast.criteria.circuit.graph import Graph
from clue_fast.criteria.measurements import MEASUREMENTS
from clue_fast.criteria.registry import CRITERIA, Criterion, Measured, criterion, importances
from clue_fast.errors import SelectionError
from clue_fast.selection import Selection
from clue_fast.sites import DEFAULT_KINDS, Site

if TYPE_CHECKING:
    from clue_fast.criteria.measure import Task

logger = logging.getLogger(__name__)

CIRCUIT = "circuit"

MEASUREMENTS["circuits"] = replace(
    MEASUREMENTS["gradients"], each=", and 2 + 2 for the circuits", by_blocks=False, live=False
)
"""What ranks the units inside a node; circuits themselves are found by the criterion."""


@dataclass(frozen=True)
class CircuitCriterion(Criterion):
    """Selects by the circuits of a forget set and of one or more retain sets."""

    kinds: tuple[str, ...] = (*DEFAULT_KINDS, "projection")
    settings: type | None = CircuitConfig
    many_retain_sets: bool = True
    always_categorizes: bool = True

    @property
    def subject(self) -> str:
        """Circuits, not units."""
        return "circuits"

    def check(self, budget: Mapping[str, Any], retain: Any, settings: Any, categories: bool) -> None:
        """Refuses budgets that circuits have no use for. Raises BudgetError."""
        super().check(budget, retain, settings, categories)
        check_circuit_budget(budget["threshold"], budget["scope"], budget["normalize"])

    def check_sites(self, model: nn.Module, sites: Sequence[Site], budget: Mapping[str, Any]) -> None:
        """Raises BudgetError or CircuitError where units belong to no node, or are fewer than are to be selected."""
        check_units(Graph(find_architecture(model, sites)), sites, budget["fraction"], count=budget["count"])

    def find(self, task: Task) -> tuple[Discovery, CircuitConfig]:
        """Finds the circuits, and the category of every node. Raises what ``discover`` raises."""
        settings = task.settings or CircuitConfig()
        discovery = discover(
            task.model,
            task.forget,
            task.retain,
            tokenizer=task.tokenizer,
            settings=settings,
            target=task.differentiated,
            max_length=task.max_length,
            progress=task.progress,
            sites=task.found.sites,
        )
        logger.info("%s", discovery.table())
        return discovery, settings

    def select(self, measured: Measured, budget: Mapping[str, Any], categories: bool = False) -> Selection:
        """The selection that ``select_units`` makes."""
        if measured.found is None:
            raise SelectionError(
                f"criterion {self.name!r} selects by circuits, which statistics do not hold; use localize"
            )
        discovery, settings = measured.found
        return select_units(
            discovery,
            *importances(measured.statistics, self.name),
            budget["fraction"],
            count=budget["count"],
            granularity=settings.granularity,
        )


@criterion(
    needs="circuits",
    target="log_odds",
    importance=lambda units: units.abs_attribution,
    kind=CircuitCriterion,
)
def circuit(measured: Measured) -> Tensor:
    """Rank within the site, by E_forget|p|, E_retain|p| or the lower rank of both, as the category of the node asks

    Categories of nodes come from the logic of the circuits of both sets; a unit of an irrelevant node has 0.

    Source: CLUE, arXiv 2509.20977.
    """
    selection = CRITERIA[CIRCUIT].select(measured, {"fraction": None, "count": None})
    return torch.cat([selection.scores[site] for site in selection.sites]).to(measured.statistics.values.device)
