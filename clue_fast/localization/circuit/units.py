"""From the categories of nodes to those of the units inside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clue_fast.budget import check_budget, pools, top
from clue_fast.errors import BudgetError, CircuitError
from clue_fast.localization.circuit.discovery import Discovery, category_bits, score_within
from clue_fast.localization.circuit.graph import Graph
from clue_fast.selection import Scores, Selection
from clue_fast.sites import HEAD_FAMILIES, Site


def select_units(
    discovery: Discovery,
    forget: Scores,
    retain: Scores,
    fraction: float | None = None,
    *,
    count: int | None = None,
    granularity: str = "neuron",
) -> Selection:
    """Gives every unit the category of its node.

    What a head writes, and what it reads with, are nodes of their own: columns of the output projection, rows of those
    of queries, keys and values, as in the published code; a key/value head that several heads share is one node. Whole
    heads have all the categories of their nodes together. An MLP is a node of many units: at the granularity "neuron"
    the top of them, ranked by ``score_within``, have its category and the others none; at "node" all have it.

    Args:
        discovery: see ``discover``.
        forget, retain: importances of all units to both sets, see ``importances``.
        fraction, count: how many units of an MLP, see ``select``; default 10 %.
        granularity: "neuron" or "node".

    Raises:
        BudgetError: the budget is out of range.
        CircuitError: a site lies in no layer of the circuit.
    """
    budget, value = check_budget(fraction, count=count)
    numbers = unit_numbers(tuple(forget), fraction, count)
    categories: dict[Site, Tensor] = {}
    scores: dict[Site, Tensor] = {}
    for site in forget:
        nodes = unit_nodes(discovery.graph, site)
        bits = torch.tensor([category_bits(discovery.categories, own) for own in nodes], dtype=torch.int8, device="cpu")
        scores[site] = score_within(bits, forget[site].cpu(), retain[site].cpu())
        if granularity == "neuron" and site in numbers:
            bits = torch.where(top(scores[site], numbers[site]), bits, 0).to(torch.int8)
        categories[site] = bits
    source: dict[str, Any] = {"criterion": "circuit", "granularity": granularity, budget: value, **discovery.source()}
    return Selection(tuple(forget), categories, scores, source, forget.fingerprint)


def check_units(
    graph: Graph, sites: Sequence[Site], fraction: float | None = None, *, count: int | None = None
) -> None:
    """Raises what ``select_units`` raises, before the circuits are known."""
    unit_numbers(sites, fraction, count)
    for site in sites:
        unit_nodes(graph, site)


def unit_numbers(sites: Sequence[Site], fraction: float | None, count: int | None) -> dict[Site, int]:
    """How many units of each MLP have the category of its node. Raises BudgetError if there are not as many."""
    budget, value = check_budget(fraction, count=count)
    channels = tuple(site for site in sites if not site.kind.startswith(HEAD_FAMILIES))
    return {site: number for (site,), number in pools(channels, budget, value, "layer")}


def unit_nodes(graph: Graph, site: Site) -> Sequence[tuple[str, ...]]:
    """The nodes that each unit of a site belongs to.

    Raises:
        CircuitError: the site lies in no layer of the circuit, or has other heads.
    """
    architecture = graph.architecture
    layers = [index for index, layer in enumerate(architecture.layers) if site.path.startswith(f"{layer.path}.")]
    if not layers:
        raise CircuitError(f"{site.name} lies in none of the {len(architecture.layers)} layers that circuits are of")
    (index,) = layers
    if not site.kind.startswith(HEAD_FAMILIES):
        return [(f"m{index}",)] * site.width
    layer = architecture.layers[index]
    names = HEAD_NODES[site.kind]
    heads = layer.kv_heads if names[0].startswith("g") else layer.heads
    if heads != site.width:
        raise CircuitError(f"{site.name} has {site.width} units, the circuit has {heads} heads")
    return [tuple(f"a{index}.{name.format(head)}" for name in names) for head in range(heads)]


HEAD_NODES = {
    "attention_head": ("h{}", "h{}.q", "g{}.k", "g{}.v"),
    "attention_query": ("h{}", "h{}.q"),
    "attention_key_value": ("g{}.k", "g{}.v"),
    "projection_query": ("h{}.q",),
    "projection_key": ("g{}.k",),
    "projection_value": ("g{}.v",),
    "projection_output": ("h{}",),
}
"""The nodes of a unit in its layer, by its kind, with the number of its head or key/value head."""


def check_circuit_budget(threshold: float | None, scope: str, normalize: str | None) -> None:
    """Raises BudgetError for budgets that circuits have no use for."""
    if threshold is not None or scope != "layer" or normalize is not None:
        raise BudgetError(
            "the criterion 'circuit' ranks the units of each MLP by themselves: give a fraction or count, with the "
            "scope 'layer', and no threshold or normalization"
        )
