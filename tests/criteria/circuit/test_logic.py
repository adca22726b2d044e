"""Gates, logic and solver: circuits made by hand, and random ones against all assignments."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clue_fast.criteria.circuit import (
    Circuit,
    EdgeScores,
    Graph,
    find_circuits,
    make_circuit,
    make_formula,
    node_categories,
    prune,
    solve,
    strongest_edges,
)
from clue_fast.criteria.circuit.architecture import Architecture, Layer, Projection
from clue_fast.criteria.circuit.logic import Formula
from clue_fast.errors import CircuitError, UnknownNameError


def circuit(**inputs: str) -> Circuit:
    """From node="GATE: a b, GATE: c"."""
    edges = {}
    for node, text in inputs.items():
        for part in text.split(","):
            gate, _, sources = part.partition(":")
            edges |= {(source, node): gate.strip() for source in sources.split()}
    return Circuit(edges)


def solved(forget: Circuit, *retains: Circuit, logic: str = "published") -> tuple[int, dict[str, str]]:
    formula = make_formula(forget, retains, logic)
    solution = solve(formula)
    assert solution.optimal
    return solution.conflicts, node_categories(formula, solution.values)


# Every input of an OR or ADDER must go off to turn the output off; every input of an AND or ADDER must stay on to
# keep it on. One input is enough of an AND to turn it off, and of an OR to keep it on.


def test_adders_on_both_sides_leave_no_choice() -> None:
    conflicts, categories = solved(circuit(logits="ADDER: a b"), circuit(logits="ADDER: b c"))
    assert conflicts == 1
    assert categories == {"a": "forget", "b": "conflict", "c": "retain"}


def test_one_input_of_an_and_is_enough_to_forget() -> None:
    conflicts, categories = solved(circuit(logits="AND: a b"), circuit(logits="ADDER: b"))
    assert conflicts == 0
    assert categories == {"a": "forget", "b": "retain"}


def test_one_input_of_an_or_is_enough_to_retain() -> None:
    conflicts, categories = solved(circuit(logits="OR: a b"), circuit(logits="OR: b c"))
    assert conflicts == 0
    assert categories == {"a": "forget", "b": "forget", "c": "retain"}


def test_several_gates_at_a_node_must_agree() -> None:
    conflicts, categories = solved(circuit(logits="AND: a b, OR: c d"), circuit(logits="ADDER: a c"))
    assert conflicts == 1
    assert categories == {"a": "retain", "b": "forget", "c": "conflict", "d": "forget"}


def test_what_is_behind_a_node_follows_it() -> None:
    conflicts, categories = solved(circuit(logits="ADDER: m", m="ADDER: e f"), circuit(logits="AND: k", k="OR: e f"))
    assert conflicts == 1
    assert sorted([categories["e"], categories["f"]]) == ["conflict", "forget"]


def test_several_retain_circuits_share_their_nodes() -> None:
    forget = circuit(logits="AND: a b c")
    assert solved(forget, circuit(logits="ADDER: a"), circuit(logits="ADDER: b")) == (
        0,
        {"a": "retain", "b": "retain", "c": "forget"},
    )
    retains = [circuit(logits=f"ADDER: {node}") for node in "abc"]
    assert solved(forget, *retains)[0] == 1


def test_nodes_of_one_circuit_that_need_not_change_are_irrelevant() -> None:
    categories = solved(circuit(logits="AND: a b"), circuit(logits="OR: a c"))[1]
    assert categories["b"] == "forget" and categories["a"] == "retain"
    formula = make_formula(circuit(logits="AND: a b"), [circuit(logits="OR: c d")])
    values = {formula.forget["logits"]: False, formula.forget["a"]: True, formula.forget["b"]: False}
    values |= {formula.retain["logits"]: True, formula.retain["c"]: True, formula.retain["d"]: False}
    assert node_categories(formula, values) == {"a": "irrelevant", "b": "forget", "c": "retain", "d": "irrelevant"}


# All assignments.


def random_circuit(rng: random.Random, nodes: int) -> Circuit:
    """Some of a pool of nodes, in a fixed order, that all reach the output."""
    names = [*sorted(rng.sample(range(nodes + 4), nodes - 1)), "logits"]
    edges = {
        (f"n{source}", node if node == "logits" else f"n{node}"): rng.choice(["AND", "OR", "ADDER"])
        for position, node in enumerate(names)
        for source in names[:position]
        if rng.random() < 0.3
    }
    if not any(node == "logits" for _, node in edges):
        edges[f"n{names[0]}", "logits"] = "ADDER"
    return Circuit(prune(edges))


def assignments(own: Circuit, adder: str, output: bool) -> tuple[list[str], np.ndarray]:
    """Nodes of a circuit, and all assignments to them that its gates and output allow, [assignments, nodes] bool."""
    nodes = own.nodes
    numbers = np.arange(2 ** len(nodes))
    values = {node: (numbers >> bit & 1).astype(bool) for bit, node in enumerate(nodes)}
    allowed = values["logits"] == output
    for node in nodes:
        for gate in ("AND", "OR", "ADDER"):
            inputs = [values[a] for (a, b), kind in own.edges.items() if b == node and kind == gate]
            if inputs:
                everything = (adder if gate == "ADDER" else gate) == "AND"
                result = np.logical_and.reduce(inputs) if everything else np.logical_or.reduce(inputs)
                allowed &= values[node] == result
    return nodes, np.stack([values[node][allowed] for node in nodes], axis=1)


def fewest_conflicts(forget: Circuit, retain: Circuit) -> int:
    forget_nodes, off = assignments(forget, "OR", False)
    retain_nodes, on = assignments(retain, "AND", True)
    common = [node for node in forget_nodes if node in retain_nodes and node != "logits"]
    off = np.unique(off[:, [forget_nodes.index(node) for node in common]], axis=0)
    on = np.unique(on[:, [retain_nodes.index(node) for node in common]], axis=0)
    return int(min((row != on).sum(1).min() for row in off)) if common else 0


def turned_on(own: Circuit, left_alone: set[str]) -> bool:
    """Whether the output of a forget circuit is on, an ADDER being on if any input is."""

    @functools.cache
    def is_on(node: str) -> bool:
        if node not in left_alone:
            return False
        gates = [
            kind for kind in ("AND", "OR", "ADDER") if any(b == node and k == kind for (_, b), k in own.edges.items())
        ]
        values = {kind: [is_on(a) for (a, b), k in own.edges.items() if b == node and k == kind] for kind in gates}
        return not gates or any(all(values[kind]) if kind == "AND" else any(values[kind]) for kind in gates)

    return is_on("logits")


def needed_sets(own: Circuit) -> list[set[str]]:
    """All sets of nodes that keep the output of a retain circuit on: with each node all inputs, or one of an OR."""
    found = []
    nodes = own.nodes
    for number in range(2 ** len(nodes)):
        chosen = {node for bit, node in enumerate(nodes) if number >> bit & 1}
        if "logits" in chosen and all(
            (any if kind == "OR" else all)(a in chosen for (a, b), k in own.edges.items() if (b, k) == (node, kind))
            for node in chosen
            for kind in {k for (_, b), k in own.edges.items() if b == node}
        ):
            found.append(chosen)
    return found


def test_the_cut_changes_the_fewest_nodes_that_are_needed() -> None:
    rng = random.Random(0)
    seen = set()
    for _ in range(150):
        forget, retain = (random_circuit(rng, rng.randint(2, 8)) for _ in range(2))
        common = sorted((set(forget.nodes) & set(retain.nodes)) - {"logits"})
        needed = needed_sets(retain)
        fewest = None
        for number in range(2 ** len(common)):
            changed = {node for bit, node in enumerate(common) if number >> bit & 1}
            if not turned_on(forget, {*common, "logits"} - changed):
                costs = min(len(changed & own) for own in needed), len(changed)
                fewest = costs if fewest is None else min(fewest, costs)
        conflicts, categories = solved(forget, retain, logic="cut")
        assert fewest is not None and conflicts == fewest[0]
        changed = {node for node in common if categories[node] in ("conflict", "forget")}
        assert len(changed) == fewest[1] and not turned_on(forget, {*common, "logits"} - changed)
        only = set(forget.nodes) - set(retain.nodes)
        assert all(categories[node] == "forget" for node in only)
        seen.add(fewest)
    assert len(seen) > 3


def test_a_node_may_go_off_although_its_inputs_stay_on() -> None:
    """Of a chain that both circuits share, the published logic turns all off and the cut one node."""
    chain = circuit(logits="ADDER: c", c="ADDER: b", b="ADDER: a")
    assert solved(chain, chain) == (3, dict.fromkeys("cba", "conflict"))
    conflicts, categories = solved(chain, chain, logic="cut")
    assert conflicts == 1 and sorted(categories.values()) == ["conflict", "retain", "retain"]
    longer = circuit(logits="ADDER: c", c="ADDER: x", x="ADDER: a")
    assert solved(longer, chain, logic="cut") == (0, {"x": "forget", "c": "retain", "a": "retain", "b": "retain"})


@pytest.mark.parametrize("logic", ["published", "cut"])
def test_the_embedding_is_no_node(logic: str) -> None:
    own = circuit(logits="ADDER: m embed", m="ADDER: embed")
    assert solved(own, own, logic=logic) == (1, {"m": "conflict"})
    only = Circuit({("embed", "logits"): "ADDER"})
    with pytest.raises(CircuitError, match="no path to the output"):
        make_formula(only, [own], logic)


def test_an_unknown_logic() -> None:
    with pytest.raises(UnknownNameError, match="choose one of: cut, published"):
        make_formula(circuit(logits="OR: a"), [circuit(logits="OR: a")], "fuzzy")


@pytest.mark.parametrize("part", range(10))
def test_no_assignment_has_fewer_conflicts(part: int) -> None:
    rng = random.Random(part)
    seen = set()
    for _ in range(100):
        forget, retain = (random_circuit(rng, rng.randint(2, 15)) for _ in range(2))
        formula = make_formula(forget, [retain])
        solution = solve(formula)
        assert solution.optimal and solution.conflicts == fewest_conflicts(forget, retain)
        assert all(any(solution.values[abs(x)] == (x > 0) for x in clause) for clause in formula.hard)
        limited = solve(formula, time_limit=0.0)
        assert limited.lower_bound <= solution.conflicts <= limited.conflicts
        seen.add(solution.conflicts)
    assert len(seen) > 3


def test_a_limit_that_ends_the_search_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Each pair of common nodes conflicts once, so that the solver needs a core for each of them."""
    pairs = range(400)
    forget = circuit(logits="ADDER: " + " ".join(f"x{i}" for i in pairs), **{f"x{i}": f"AND: a{i} b{i}" for i in pairs})
    retain = circuit(logits="ADDER: " + " ".join(f"y{i}" for i in pairs), **{f"y{i}": f"AND: a{i} b{i}" for i in pairs})
    formula = make_formula(forget, [retain])
    solution = solve(formula, time_limit=1e-4)
    assert not solution.optimal
    assert solution.lower_bound < 400 == solution.conflicts
    assert f"using an assignment with 400, and at least {solution.lower_bound} are needed" in caplog.text
    assert solve(formula).conflicts == 400


def test_gates_that_contradict_each_other() -> None:
    formula = Formula(hard=[[1], [-1]], variables=1)
    for limit in (10.0, 0.0):
        with pytest.raises(CircuitError, match="contradict"):
            solve(formula, limit)


# Circuits from scores.


def tiny_graph() -> Graph:
    """Two layers of two heads that share a key/value head."""
    q, kv = torch.arange(4).view(2, 2), torch.arange(2).view(1, 2)

    def layer(index: int) -> Layer:
        path = f"layers.{index}"
        projections = [Projection(f"{path}.{name}", rows) for name, rows in (("q", q), ("k", kv), ("v", kv))]
        mlp = f"{path}.mlp"
        return Layer(path, 2, 1, 2, *projections, f"{path}.o", None, None, mlp, mlp, None, None, False)

    return Graph(Architecture((layer(0), layer(1)), "norm", 4))


GRAPH = tiny_graph()


def scores(**edges: float) -> torch.Tensor:
    """From m0__a1_h0_q=2.0: the score of the edge from m0 to a1.h0.q."""
    values = torch.zeros(GRAPH.valid.shape, dtype=torch.float64)
    for edge, value in edges.items():
        source, target = (name.replace("_", ".") for name in edge.split("__"))
        writer = [writer.name for writer in GRAPH.writers].index(source)
        assert bool(GRAPH.valid[writer, GRAPH.reader_index[target]])
        values[writer, GRAPH.reader_index[target]] = value
    return values


def names(edges: set[tuple[int, int]]) -> set[tuple[str, str]]:
    return {(GRAPH.writers[w].name, GRAPH.readers[r].name) for w, r in edges}


def test_the_strongest_edges_grow_from_the_output() -> None:
    strong = scores(m1__logits=1.0, a1_h0__m1=-3.0, m0__a1_h0_q=2.0, embed__a0_h0_q=9.0, a0_h0__logits=0.5)
    assert names(strongest_edges(GRAPH, strong, 2)) == {("m1", "logits"), ("a1.h0", "m1")}
    assert names(strongest_edges(GRAPH, strong, 3)) == {("m1", "logits"), ("a1.h0", "m1"), ("m0", "a1.h0.q")}
    assert names(strongest_edges(GRAPH, strong, 5)) == {
        ("m1", "logits"),
        ("a1.h0", "m1"),
        ("m0", "a1.h0.q"),
        ("a0.h0", "logits"),
        ("embed", "a0.h0.q"),
    }
    assert len(strongest_edges(GRAPH, strong, 50)) == 5


@given(seed=st.integers(0, 10_000), count=st.integers(1, 40))
@settings(max_examples=50)
def test_every_edge_reaches_the_output(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pair = [torch.randn(GRAPH.valid.shape, generator=generator) * GRAPH.valid for _ in range(2)]
    noising, denoising = (strongest_edges(GRAPH, each, count) for each in pair)
    assert len(noising) == len(denoising) == min(count, int(GRAPH.valid.sum()))
    made = make_circuit(GRAPH, noising, denoising)
    assert {edge for edge in made.edges if edge[1][-2:] not in (".h0", ".h1") or edge[1] == "logits"} >= names(
        noising | denoising
    )


def test_gates_tell_in_which_direction_an_edge_was_found() -> None:
    noising = scores(m1__logits=3.0, a1_h0__logits=2.0, a0_h0__logits=2.0, m0__a1_h0_q=1.0, embed__a1_h0_q=1.0)
    denoising = scores(m1__logits=3.0, a1_h1__logits=2.0, m0__logits=2.0, m0__a1_g0_k=1.0, embed__a1_g0_k=1.0)
    assert dict(make_circuit(GRAPH, *(strongest_edges(GRAPH, s, 5) for s in (noising, denoising))).edges) == {
        ("m1", "logits"): "ADDER",
        ("a1.h0", "logits"): "AND",
        ("a0.h0", "logits"): "AND",
        ("a1.h1", "logits"): "OR",
        ("m0", "logits"): "OR",
        ("m0", "a1.h0.q"): "AND",
        ("embed", "a1.h0.q"): "AND",
        ("m0", "a1.g0.k"): "OR",
        ("embed", "a1.g0.k"): "OR",
        ("a1.h0.q", "a1.h0"): "ADDER",
        ("a1.g0.k", "a1.h0"): "ADDER",
        ("a1.g0.k", "a1.h1"): "ADDER",
    }


def test_a_gate_has_more_than_one_input() -> None:
    """Definition 1 of arXiv 2505.10039: what is alone in its gate is an ADDER."""
    noising = strongest_edges(GRAPH, scores(m1__logits=2.0, a1_h0__logits=1.0, m0__a1_h0_q=1.0), 3)
    denoising = strongest_edges(GRAPH, scores(m1__logits=2.0, a1_h1__logits=1.0, m0__a1_g0_k=1.0), 3)
    assert set(make_circuit(GRAPH, noising, denoising).edges.values()) == {"ADDER"}
    both = {("m1", "logits"), ("a1.h0", "logits"), ("a1.h1", "logits")}
    noising |= strongest_edges(GRAPH, scores(a0_h0__logits=1.0), 1)
    gates = make_circuit(GRAPH, noising, denoising).edges
    assert {gates[edge] for edge in both} == {"ADDER", "AND"} and gates["a0.h0", "logits"] == "AND"


def test_all_circuits_have_the_same_number_of_edges() -> None:
    many = scores(m1__logits=2.0, a1_h0__logits=1.0, m0__a1_h0_q=1.0)
    few = scores(m1__logits=2.0, a1_h1__logits=1.0)
    circuits = find_circuits(GRAPH, {"forget": EdgeScores(many, many), "retain": EdgeScores(many, few)}, 10)
    assert {name: own.found for name, own in circuits.items()} == {"forget": 2, "retain": 2}


def test_what_does_not_reach_the_output_is_pruned() -> None:
    edges = {("a", "b"): "OR", ("b", "logits"): "AND", ("a", "c"): "OR", ("d", "c"): "ADDER"}
    assert prune(edges) == {("a", "b"): "OR", ("b", "logits"): "AND"}
    with pytest.raises(CircuitError, match="leads to the output"):
        prune({("a", "b"): "OR"})


def test_a_circuit_without_a_path_to_the_output() -> None:
    nothing = EdgeScores(scores(), scores())
    with pytest.raises(CircuitError, match="retain set reaches the output"):
        find_circuits(
            GRAPH, {"forget": EdgeScores(scores(m1__logits=1.0), scores(m1__logits=1.0)), "retain": nothing}, 3
        )
    with pytest.raises(CircuitError, match="no path to the output"):
        make_formula(circuit(logits="OR: a"), [Circuit({("a", "b"): "OR"})])
    with pytest.raises(CircuitError, match="at least one retain circuit"):
        make_formula(circuit(logits="OR: a"), [])
