"""Circuits: the strongest edges in each direction, and the gate that each of them belongs to.

Noising breaks a mechanism by corrupting one of its inputs, so it finds the inputs of AND gates, each of which is
needed; denoising restores it by one clean input, so it finds those of OR gates, each of which is enough. What both
find adds up: ADDER (Chen et al. 2025, arXiv 2505.10039, section 3.1). A gate has more than one input (definition 1
there): the only AND or OR edge into a node is an ADDER, as in the code of CLUE.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from clue_fast.errors import CircuitError
from clue_fast.localization.circuit.attribution import EdgeScores
from clue_fast.localization.circuit.graph import OUTPUT, Graph

AND, OR, ADDER = "AND", "OR", "ADDER"
GATES = (AND, OR, ADDER)

Edge = tuple[str, str]
"""From one node to another, by name."""


@dataclass(frozen=True)
class Circuit:
    """Part of a graph: edges between its nodes, each with its gate.

    Attributes:
        edges: the gate of each edge.
        found: number of edges that were chosen in each direction.
    """

    edges: Mapping[Edge, str]
    found: int = 0

    @property
    def nodes(self) -> list[str]:
        """All nodes, in the order in which the edges name them."""
        return list(dict.fromkeys(node for edge in self.edges for node in edge))

    def gates(self) -> dict[str, dict[str, list[str]]]:
        """The inputs of each node by gate: ``{node: {gate: [nodes]}}``."""
        gates: dict[str, dict[str, list[str]]] = {}
        for (source, node), gate in self.edges.items():
            gates.setdefault(node, {}).setdefault(gate, []).append(source)
        return gates


def strongest_edges(graph: Graph, scores: Tensor, count: int) -> set[tuple[int, int]]:
    """The edges with the greatest magnitude of those that reach the output, grown from the output backwards.

    In each step the strongest edge into a node that is part already is added, and with it the node where it begins
    (the greedy search of EAP-IG, Hanna et al. 2024, arXiv 2403.17806). A head that becomes part brings its q, k and
    v readers. Every edge therefore reaches the output, and none has to be pruned.

    Args:
        graph: writers and readers.
        scores: [writers, readers].
        count: number of edges.

    Returns:
        At most ``count`` pairs of writer and reader; fewer where no edge with a score other than 0 is left.
    """
    magnitudes = scores.abs().tolist()
    heap: list[tuple[float, int, int]] = []
    opened: set[int] = set()

    def open_reader(reader: int) -> None:
        if reader in opened:
            return
        opened.add(reader)
        for writer in graph.valid[:, reader].nonzero().flatten().tolist():
            if magnitudes[writer][reader] > 0.0:
                heapq.heappush(heap, (-magnitudes[writer][reader], writer, reader))

    open_reader(graph.reader_index[OUTPUT])
    chosen: set[tuple[int, int]] = set()
    while heap and len(chosen) < count:
        _, writer, reader = heapq.heappop(heap)
        chosen.add((writer, reader))
        for behind in graph.readers_of(graph.writers[writer]):
            open_reader(behind)
    return chosen


def find_circuits(graph: Graph, scores: Mapping[str, EdgeScores], count: int) -> dict[str, Circuit]:
    """Makes a circuit of each set of scores, all with the same number of edges in both directions.

    Args:
        graph: writers and readers.
        scores: by the name of the data set.
        count: edges in each direction; where some set has fewer that matter, all get that number.

    Raises:
        CircuitError: nothing reaches the output.
    """
    chosen = {
        name: [strongest_edges(graph, s, count) for s in (own.noising, own.denoising)] for name, own in scores.items()
    }
    fewest = min(len(edges) for pair in chosen.values() for edges in pair)
    if fewest == 0:
        empty = next(name for name, pair in chosen.items() if not all(pair))
        raise CircuitError(
            f"no edge of the circuit of the {empty} set reaches the output: its clean and corrupted runs do not differ"
        )
    circuits = {}
    for name, own in scores.items():
        noising, denoising = (strongest_edges(graph, s, fewest) for s in (own.noising, own.denoising))
        circuits[name] = make_circuit(graph, noising, denoising)
    return circuits


def make_circuit(graph: Graph, noising: set[tuple[int, int]], denoising: set[tuple[int, int]]) -> Circuit:
    """Joins the edges of both directions; AND is in the first only, OR in the second only, ADDER in both.

    An AND or OR edge that is the only one of its gate into its node is an ADDER. A head depends on its q, k and v
    readers that the circuit feeds, as on the inputs of an ADDER.

    Raises:
        CircuitError: no edge leads to the output.
    """
    edges: dict[Edge, str] = {}
    fed: set[int] = set()
    writers: set[int] = set()
    for writer, reader in sorted(noising | denoising):
        gate = ADDER if (writer, reader) in noising and (writer, reader) in denoising else None
        if gate is None:
            gate = AND if (writer, reader) in noising else OR
        edges[graph.writers[writer].name, graph.readers[reader].name] = gate
        writers.add(writer)
        fed.add(reader)
    inputs = Counter((node, gate) for (_, node), gate in edges.items())
    edges = {(source, node): gate if inputs[node, gate] > 1 else ADDER for (source, node), gate in edges.items()}
    for writer in sorted(writers):
        own = graph.writers[writer]
        if own.head is not None:
            edges |= {(graph.readers[r].name, own.name): ADDER for r in graph.readers_of(own) if r in fed}
    return Circuit(prune(edges), min(len(noising), len(denoising)))


def prune(edges: Mapping[Edge, str]) -> dict[Edge, str]:
    """Returns the edges from which the output can be reached.

    Raises:
        CircuitError: there are none.
    """
    sources: dict[str, list[str]] = {}
    for source, node in edges:
        sources.setdefault(node, []).append(source)
    reaching = {OUTPUT}
    waiting = [OUTPUT]
    while waiting:
        for source in sources.get(waiting.pop(), ()):
            if source not in reaching:
                reaching.add(source)
                waiting.append(source)
    kept = {edge: gate for edge, gate in edges.items() if edge[1] in reaching}
    if not kept:
        raise CircuitError("no edge of the circuit leads to the output")
    return kept


def count_gates(circuit: Circuit) -> dict[str, int]:
    """How many edges of each gate there are."""
    return {**dict.fromkeys(GATES, 0), **Counter(circuit.edges.values())}
