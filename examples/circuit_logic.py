"""How much the logic of circuits decides, on the demo's model, by its settings.

    python examples/circuit_logic.py [--model FOLDER] [--docs docs/localization.md]

The demo's model learns its people (some two minutes on one core), or is read from a folder that this script or
``clue-fast demo`` left. Effects of edges are measured once for each number of steps; everything else follows from
them. Two tables: what each setting makes of the nodes that both circuits have, and the default with one thing changed,
to see what decides. ``--docs`` writes them between the marks in that file.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clue_fast.criteria.circuit import (
    Circuit,
    EdgeScores,
    Graph,
    corrupt,
    edge_scores,
    make_circuit,
    make_formula,
    node_categories,
    solve,
    strongest_edges,
)
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.criteria.circuit.graph import ADDER, AND, EMBEDDING, GATES, OR, OUTPUT, count_gates, prune
from clue_fast.criteria.passes import inference
from clue_fast.demo import make_data
from clue_fast.demo.pretraining import train_model, train_tokenizer

EDGES = (0.02, 0.05, 0.1, 0.2, 0.3)
STEPS = (0, 3)
DEFAULT = 0.05
CATEGORIES = ("conflict", "forget", "retain", "irrelevant")
MARKS = "<!-- logic of circuits -->", "<!-- end of logic of circuits -->"

Circuits = Mapping[str, Circuit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the demo's model; it is trained and left there if absent")
    parser.add_argument("--docs", type=Path, help="file that the tables are written into")
    options = parser.parse_args()
    data = make_data()
    model, tokenizer = read_model(options.model)
    graph = Graph(find_architecture(model))
    examples = {
        name: own.examples for name, own in corrupt({"forget": data.forget, "retain": data.retain}, tokenizer).items()
    }
    scores = {}
    for steps in STEPS:
        with inference(model):
            scores[steps] = {
                name: edge_scores(model, graph, own, pad_token_id=tokenizer.pad_token_id, steps=steps)
                for name, own in examples.items()
            }
    tables = f"{settings_table(graph, scores)}\n\n{changes_table(graph, scores[0])}"
    print(tables)
    if options.docs is not None:
        write_between(options.docs, tables)


def read_model(folder: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if folder is not None and (folder / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    everything = make_data().everything
    tokenizer = train_tokenizer(everything)
    model = train_model(everything, tokenizer, description="learn everybody").eval()
    if folder is not None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model, tokenizer


def settings_table(graph: Graph, scores: Mapping[int, Mapping[str, EdgeScores]]) -> str:
    lines = [
        "| edges | steps | AND | OR | ADDER | common | logic | conflict | forget | retain | irrelevant |",
        "|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for steps, own in scores.items():
        for share in EDGES:
            circuits = make_circuits(graph, own, share)
            gates = gate_counts(circuits)
            for logic in ("published", "cut"):
                counts, common = decide(circuits, logic)
                cells = [f"{share:.0%}", steps, *(gates[gate] for gate in GATES), common, logic]
                lines.append(row([*cells, *(counts[category] for category in CATEGORIES)]))
    return "\n".join(lines)


def changes_table(graph: Graph, scores: Mapping[str, EdgeScores]) -> str:
    circuits = make_circuits(graph, scores, DEFAULT)
    cases: dict[str, Circuits] = {
        "nothing": circuits,
        "gates of one edge stay AND or OR": make_circuits(graph, scores, DEFAULT, single=True),
        "ADDER where the effects are within a factor of 2": by_effect(graph, scores, DEFAULT, 2.0),
        "ADDER where the effects are within a factor of 1.5": by_effect(graph, scores, DEFAULT, 1.5),
        "AND from q, k and v to their head": changed(circuits, lambda edge, gate: AND if is_head(edge[1]) else gate),
        "both of the last two": changed(
            by_effect(graph, scores, DEFAULT, 1.5), lambda edge, gate: AND if is_head(edge[1]) else gate
        ),
        "the embedding is a node": {name: with_embedding(own) for name, own in circuits.items()},
    }
    lines = [
        "| changed | AND | OR | ADDER | common | forced | conflict, published | conflict, cut |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in cases.items():
        gates = gate_counts(own)
        published, common = decide(own, "published")
        cells = [name, *(gates[gate] for gate in GATES), common, len(forced(own)), published["conflict"]]
        lines.append(row([*cells, decide(own, "cut")[0]["conflict"]]))
    return "\n".join(lines)


def make_circuits(graph: Graph, scores: Mapping[str, EdgeScores], share: float, single: bool = False) -> Circuits:
    """The circuits of both sets; with ``single``, the only edge of a gate keeps its gate."""
    count = round(share * int(graph.valid.sum()))
    circuits = {}
    for name, own in scores.items():
        noising, denoising = (strongest_edges(graph, each, count) for each in (own.noising, own.denoising))
        circuits[name] = make_circuit(graph, noising, denoising)
        if single:
            names = [
                {(graph.writers[w].name, graph.readers[r].name) for w, r in edges} for edges in (noising, denoising)
            ]
            circuits[name] = Circuit(
                {
                    edge: AND if edge in names[0] - names[1] else OR if edge in names[1] - names[0] else gate
                    for edge, gate in circuits[name].edges.items()
                }
            )
    return circuits


def by_effect(graph: Graph, scores: Mapping[str, EdgeScores], share: float, factor: float) -> Circuits:
    """An edge is an ADDER if its effects in both directions, in units of the weakest chosen one, are similar."""
    count = round(share * int(graph.valid.sum()))
    circuits = {}
    for name, own in scores.items():
        effects = [each.abs() for each in (own.noising, own.denoising)]
        chosen = [strongest_edges(graph, each, count) for each in effects]
        units = [min(float(each[edge]) for edge in edges) for each, edges in zip(effects, chosen, strict=True)]
        directions: list[set[tuple[int, int]]] = [set(), set()]
        for edge in chosen[0] | chosen[1]:
            noising, denoising = (float(each[edge]) / unit for each, unit in zip(effects, units, strict=True))
            if noising * factor >= denoising:
                directions[0].add(edge)
            if denoising * factor >= noising:
                directions[1].add(edge)
        circuits[name] = make_circuit(graph, *directions)
    return circuits


def changed(circuits: Circuits, gate_of: Callable[[tuple[str, str], str], str]) -> Circuits:
    return {
        name: Circuit({edge: gate_of(edge, gate) for edge, gate in own.edges.items()}) for name, own in circuits.items()
    }


def is_head(node: str) -> bool:
    return ".h" in node and not node.endswith(".q")


def with_embedding(circuit: Circuit) -> Circuit:
    """The same under another name, which the logic does not leave out."""
    return Circuit(
        {("input" if source == EMBEDDING else source, node): g for (source, node), g in circuit.edges.items()}
    )


def decide(circuits: Circuits, logic: str) -> tuple[Counter[str], int]:
    """The categories of the common nodes, and how many there are."""
    formula = make_formula(circuits["forget"], [circuits["retain"]], logic)
    categories = node_categories(formula, solve(formula).values)
    return Counter(categories[node] for node in formula.conflict), len(formula.conflict)


def forced(circuits: Circuits) -> set[str]:
    """Nodes that the output alone decides in both: by a path of OR and ADDER, and by one of AND and ADDER."""
    nodes = []
    for name, gates in (("forget", (OR, ADDER)), ("retain", (AND, ADDER))):
        own = {edge: gate for edge, gate in circuits[name].edges.items() if gate in gates and edge[0] != EMBEDDING}
        reaching = prune(own)
        nodes.append({source for source, _ in reaching})
    return (nodes[0] & nodes[1]) - {OUTPUT}


def gate_counts(circuits: Circuits) -> Counter[str]:
    return sum((Counter(count_gates(own)) for own in circuits.values()), Counter[str]())


def row(cells: list[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write_between(path: Path, tables: str) -> None:
    """Replaces what stands between the marks."""
    text = path.read_text(encoding="utf-8")
    begin, end = (text.index(mark) for mark in MARKS)
    path.write_text(f"{text[: begin + len(MARKS[0])]}\n{tables}\n{text[end:]}", encoding="utf-8")


if __name__ == "__main__":
    main()
