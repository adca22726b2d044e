"""From records to circuits, from circuits to the categories of nodes, and from those to the categories of units."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from clue_fast.config import CircuitConfig
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.criteria.circuit.attribution import edge_scores
from clue_fast.criteria.circuit.corruption import CorruptedSet, corrupt
from clue_fast.criteria.circuit.graph import GATES, Circuit, EdgeScores, Graph, count_gates, find_circuits
from clue_fast.criteria.circuit.logic import Solution, check_solver, make_formula, node_categories, solve
from clue_fast.criteria.passes import inference
from clue_fast.data import Record, check_encoding, padding_token
from clue_fast.data.collator import check_examples, longest
from clue_fast.errors import BudgetError, CircuitError
from clue_fast.selection import Scores, Selection, check_budget, pools, top
from clue_fast.sites import HEAD_FAMILIES, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
FORGET = "forget"


@dataclass(frozen=True)
class Discovery:
    """What was found.

    Attributes:
        graph: of the model.
        scores: effects of all edges by data set, ``forget`` first.
        circuits: by data set.
        solution: of the logic.
        categories: of every node of a circuit but the output.
        corrupted: how the prompts of each data set were corrupted.
    """

    graph: Graph
    scores: Mapping[str, EdgeScores]
    circuits: Mapping[str, Circuit]
    solution: Solution
    categories: Mapping[str, str]
    corrupted: Mapping[str, CorruptedSet] = field(default_factory=dict)

    @property
    def common(self) -> list[str]:
        """The nodes of the forget circuit that a retain circuit has too: those that the logic is asked about."""
        retain = {node for name, circuit in self.circuits.items() if name != FORGET for node in circuit.nodes}
        return [node for node in self.circuits[FORGET].nodes if node in retain and node in self.categories]

    def source(self) -> dict[str, Any]:
        """What a selection keeps of it, as JSON holds it."""
        return {
            "retain_sets": [name for name in self.circuits if name != FORGET],
            "edges": {name: len(circuit.edges) for name, circuit in self.circuits.items()},
            "gates": {name: count_gates(circuit) for name, circuit in self.circuits.items()},
            "nodes": dict(Counter(self.categories.values())),
            "common": len(self.common),
            "conflicts": self.solution.conflicts,
            "conflicts_at_least": self.solution.lower_bound,
            "corrupted": {name: own.source() for name, own in self.corrupted.items()},
        }

    def table(self) -> str:
        """Returns a table: nodes and gates of each circuit, and the nodes of each category."""
        lines = [f"{'circuit':<12}  nodes  edges  " + "  ".join(f"{gate:>5}" for gate in GATES)]
        for name, circuit in self.circuits.items():
            counts = count_gates(circuit)
            lines.append(
                f"{name:<12}  {len(circuit.nodes):>5}  {len(circuit.edges):>5}  "
                + "  ".join(f"{counts[gate]:>5}" for gate in GATES)
            )
        proven = "proven fewest" if self.solution.optimal else f"at least {self.solution.lower_bound} are needed"
        lines.append(f"nodes in conflict: {self.solution.conflicts} of {len(self.common)} common nodes ({proven})")
        for category in ("forget", "conflict", "retain", "irrelevant"):
            nodes = [node for node, own in self.categories.items() if own == category]
            lines.append(f"{category:<10}  {len(nodes):>4}  {' '.join(nodes)}")
        lines += [f"corrupted prompts of the {name} set: {own}" for name, own in self.corrupted.items()]
        return "\n".join(lines)


def discover(
    model: PreTrainedModel,
    forget: Sequence[Record],
    retain: Mapping[str, Sequence[Record]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    settings: CircuitConfig | None = None,
    target: str = "log_odds",
    max_length: int | None = 512,
    progress: bool = True,
    sites: Sequence[Site] = (),
) -> Discovery:
    """Finds the circuits of a forget set and of one or more retain sets, and the category of every node.

    Args:
        model: a decoder; it comes back as it was.
        forget: records.
        retain: records of each retain set, by name.
        tokenizer: of the model.
        settings: see ``CircuitConfig``.
        target: what is differentiated, a key of ``TARGETS``.
        max_length: longer records are cut, in tokens.
        progress: show a progress bar.
        sites: of the model, as far as they are known; see ``find_architecture``.

    Raises:
        DataError: no record of a data set can be corrupted.
        CircuitError: the residual stream of the model cannot be taken apart, or a circuit does not reach the output.
        BudgetError: more edges than there are.
    """
    settings = settings or CircuitConfig()
    check_solver()
    graph = Graph(find_architecture(model, sites))
    count = settings.edge_count(int(graph.valid.sum()))
    sets = {FORGET: forget, **retain}
    limit = longest(model, max_length)
    check_encoding(model, sets, tokenizer, limit)
    corrupted = corrupt(sets, tokenizer, corruption=settings.corruption, max_length=limit)
    for name, own in corrupted.items():
        check_examples([{"input_ids": example.corrupted_ids} for example in own.examples], model, name)
    total = sum(len(own.examples) for own in corrupted.values())
    scores = {}
    with inference(model), tqdm(total=total, desc="circuits", unit="record", disable=not progress) as bar:
        for name, own in corrupted.items():
            scores[name] = edge_scores(
                model,
                graph,
                own.examples,
                pad_token_id=padding_token(tokenizer, model),
                target=target,
                steps=settings.steps,
                tokens_per_batch=settings.tokens_per_batch,
                progress=bar.update,
            )
    circuits = find_circuits(graph, scores, count)
    formula = make_formula(circuits[FORGET], [circuits[name] for name in retain], settings.logic)
    solution = solve(formula, settings.time_limit)
    discovery = Discovery(graph, scores, circuits, solution, node_categories(formula, solution.values), corrupted)
    logger.info(
        "circuits: %d nodes, %d of %d common nodes in conflict",
        len(discovery.categories),
        solution.conflicts,
        len(discovery.common),
    )
    return discovery


def category_bits(categories: Mapping[str, str], nodes: Sequence[str]) -> int:
    """What several nodes matter to together: bit 0 the forget set, bit 1 the retain sets."""
    bits = {"forget": 1, "retain": 2, "conflict": 3}
    found = 0
    for node in nodes:
        found |= bits.get(categories.get(node, ""), 0)
    return found


def score_within(category: Tensor, forget: Tensor, retain: Tensor) -> Tensor:
    """The rank of each unit within its site, by what its category asks for, [width] float32 in [0, 1].

    Args:
        category: [width] int8, of the node of each unit.
        forget, retain: importances of the units to both sets, [width].

    Returns:
        The rank by the first for forget units, by the second for retain units, the lower of both for conflict units.
    """
    width = max(1, len(category))
    to_forget, to_retain = (x.argsort(stable=True).argsort(stable=True).float() / width for x in (forget, retain))
    rank = torch.minimum(to_forget, to_retain)
    rank = torch.where(category == 1, to_forget, torch.where(category == 2, to_retain, rank))
    return torch.where(category == 0, 0.0, rank)


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


def check_circuit_budget(threshold: float | None, scope: str, normalize: str | None) -> None:
    """Raises BudgetError for budgets that circuits have no use for."""
    if threshold is not None or scope != "layer" or normalize is not None:
        raise BudgetError(
            "the criterion 'circuit' ranks the units of each MLP by themselves: give a fraction or count, with the "
            "scope 'layer', and no threshold or normalization"
        )
