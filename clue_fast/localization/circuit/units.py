"""From the categories of nodes to those of the units inside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clue_fast.budget import check_budget, pools, top
from clue_fast.errors import BudgetError, CircuitError
from clue_fast.localization.circuit.discovery import Discovery, category_bits, score_within
from clue_fast.selection import Scores, Selection
from clue_fast.sites import Site


def select_units(
    discovery: Discovery,
    forget: Scores,
    retain: Scores,
    fraction: float | None = None,
    *,
    count: int | None = None,
    grain: str = "neuron",
) -> Selection:
    """Gives every unit the category of its node.

    A head is a node, so its units have its category: that of what it writes and of what it reads with; key/value heads
    that several heads share have that of their k and v. An MLP is a node of many units: at the grain "neuron" the top
    of them, ranked by ``score_within``, have its category and the others none; at the grain "node" all have it.

    Args:
        discovery: see ``discover``.
        forget, retain: importances of all units to both sets, see ``importances``.
        fraction, count: how many units of an MLP, see ``select``; default 10 %.
        grain: "neuron" or "node".

    Raises:
        BudgetError: the budget is out of range.
        CircuitError: a site lies in no layer of the circuit.
    """
    budget, value = check_budget(fraction, count=count)
    categories: dict[Site, Tensor] = {}
    scores: dict[Site, Tensor] = {}
    for site in forget:
        nodes = unit_nodes(discovery, site)
        bits = torch.tensor([category_bits(discovery.categories, own) for own in nodes], dtype=torch.int8)
        scores[site] = score_within(bits, forget[site].cpu(), retain[site].cpu())
        if grain == "neuron" and len(set(nodes)) == 1:
            ((_, number),) = pools((site,), budget, value, "layer")
            bits = torch.where(top(scores[site], number), bits, 0).to(torch.int8)
        categories[site] = bits
    source: dict[str, Any] = {"criterion": "circuit", "grain": grain, budget: value, **discovery.source()}
    return Selection(tuple(forget), categories, scores, source, forget.fingerprint)


def unit_nodes(discovery: Discovery, site: Site) -> Sequence[tuple[str, ...]]:
    """The nodes that each unit of a site belongs to.

    Raises:
        CircuitError: the site lies in no layer of the circuit, or has other heads.
    """
    architecture = discovery.graph.architecture
    layers = [index for index, layer in enumerate(architecture.layers) if site.path.startswith(f"{layer.path}.")]
    if not layers:
        raise CircuitError(f"{site.path} lies in none of the {len(architecture.layers)} layers that circuits are of")
    (index,) = layers
    if not site.kind.startswith("attention"):
        return [(f"m{index}",)] * site.width
    layer = architecture.layers[index]
    heads = layer.kv_heads if site.kind == "attention_key_value" else layer.heads
    if heads != site.width:
        raise CircuitError(f"{site.path} has {site.width} units of kind {site.kind}, the circuit has {heads} heads")
    query = [(f"a{index}.h{head}", f"a{index}.h{head}.q") for head in range(heads)]
    key_value = [(f"a{index}.g{head}.k", f"a{index}.g{head}.v") for head in range(heads)]
    if site.kind == "attention_query":
        return query
    if site.kind == "attention_key_value":
        return key_value
    return [(*q, *kv) for q, kv in zip(query, key_value, strict=True)]


def check_circuit_budget(threshold: float | None, scope: str, normalize: str | None) -> None:
    """Raises BudgetError for budgets that circuits have no use for."""
    if threshold is not None or scope != "layer" or normalize is not None:
        raise BudgetError(
            "the criterion 'circuit' ranks the units of each MLP by themselves: give a fraction or count, with the "
            "scope 'layer', and no threshold or normalization"
        )
