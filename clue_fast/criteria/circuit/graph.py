"""The graph of a transformer, and circuits in it: the strongest edges in each direction, each with its gate.

Nodes are writers and readers of the residual stream, edges lead from a writer to every later reader. Noising breaks a
mechanism by corrupting one of its inputs, so it finds the inputs of AND gates, each of which is needed; denoising
restores it by one clean input, so it finds those of OR gates, each of which is enough. What both find adds up: ADDER
(Chen et al. 2025, arXiv 2505.10039, section 3.1). A gate has more than one input (definition 1 there): the only AND or
OR edge into a node is an ADDER, as in the code of CLUE.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clue_fast.criteria.circuit.architecture import Architecture
from clue_fast.errors import CircuitError

EMBEDDING, OUTPUT = "embed", "logits"
AND, OR, ADDER = "AND", "OR", "ADDER"
GATES = (AND, OR, ADDER)

Edge = tuple[str, str]
"""From one node to another, by name."""


@dataclass(frozen=True)
class Writer:
    """A node that adds to the residual stream: the embedding, an attention head or an MLP.

    Attributes:
        name: of the node, ``embed``, ``a3.h7`` or ``m3``.
        layer: of it, -1 for the embedding.
        head: index of the head, or None.
        stage: place in the order of computation.
    """

    name: str
    layer: int
    head: int | None
    stage: int


@dataclass(frozen=True)
class Reader:
    """A place where the residual stream is read: by a projection of a head, an MLP, or the final norm.

    Attributes:
        name: of the node, ``a3.h7.q``, ``a3.g1.k`` (a key/value head, which several heads may share), ``m3`` or
            ``logits``.
        layer: of it, the number of layers for ``logits``.
        part: "q", "k", "v", "mlp" or "logits".
        head: index of the head or key/value head, or None.
        stage: place in the order of computation.
    """

    name: str
    layer: int
    part: str
    head: int | None
    stage: int


class Graph:
    """Writers, readers and edges of an architecture.

    Attributes:
        architecture: what it is the graph of.
        writers, readers: in the order of computation.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.writers = [Writer(EMBEDDING, -1, None, -1)]
        self.readers: list[Reader] = []
        for index, layer in enumerate(architecture.layers):
            stage = 4 * index
            for part, heads in (("q", layer.heads), ("k", layer.kv_heads), ("v", layer.kv_heads)):
                letter = "h" if part == "q" else "g"
                self.readers += [
                    Reader(f"a{index}.{letter}{head}.{part}", index, part, head, stage) for head in range(heads)
                ]
            self.writers += [Writer(f"a{index}.h{head}", index, head, stage + 1) for head in range(layer.heads)]
            self.readers.append(Reader(f"m{index}", index, "mlp", None, stage if layer.parallel else stage + 2))
            self.writers.append(Writer(f"m{index}", index, None, stage + 1 if layer.parallel else stage + 3))
        layers = len(architecture.layers)
        self.readers.append(Reader(OUTPUT, layers, "logits", None, 4 * layers))

    @cached_property
    def valid(self) -> Tensor:
        """Which edges there are, [writers, readers] bool: a writer comes before what reads it."""
        writers = torch.tensor([writer.stage for writer in self.writers], device="cpu")
        readers = torch.tensor([reader.stage for reader in self.readers], device="cpu")
        return writers[:, None] < readers[None, :]

    @cached_property
    def reader_index(self) -> dict[str, int]:
        """Index of a reader by its name."""
        return {reader.name: index for index, reader in enumerate(self.readers)}

    def readers_at(self, layer: int) -> slice:
        """The range of the readers of a layer; those of the output for the number of layers."""
        sizes = [own.heads + 2 * own.kv_heads + 1 for own in self.architecture.layers] + [1]
        start = sum(sizes[:layer])
        return slice(start, start + sizes[layer])

    def writers_until(self, layer: int) -> int:
        """How many writers there are up to the end of a layer."""
        return 1 + sum(own.heads + 1 for own in self.architecture.layers[: layer + 1])

    def readers_of(self, writer: Writer) -> list[int]:
        """Indices of the readers whose input makes up what a writer writes: q, k and v of a head, or the MLP."""
        if writer.layer < 0:
            return []
        if writer.head is None:
            return [self.reader_index[writer.name]]
        layer = self.architecture.layers[writer.layer]
        group = writer.head // (layer.heads // layer.kv_heads)
        names = f"a{writer.layer}.h{writer.head}.q", f"a{writer.layer}.g{group}.k", f"a{writer.layer}.g{group}.v"
        return [self.reader_index[name] for name in names]

    def __repr__(self) -> str:
        return f"Graph({len(self.writers)} writers, {len(self.readers)} readers, {int(self.valid.sum())} edges)"


@dataclass(frozen=True)
class EdgeScores:
    """Effects of patching edges on the mean target of the records.

    Attributes:
        noising: [writers, readers] float64, change of the target of the clean run; 0 where there is no edge.
        denoising: the same of the corrupted run.
    """

    noising: Tensor
    denoising: Tensor


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
