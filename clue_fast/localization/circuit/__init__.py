"""Circuits: which edges of a model carry an answer, and in which nodes forgetting and keeping conflict.

After CLUE (arXiv 2509.20977): ``discover`` finds the circuits of a forget set and of retain sets by edge attribution in
both directions, reads their gates, and solves their logic; ``select_units`` makes a selection of it.
"""

from clue_fast.localization.circuit.attribution import CorruptedExample, EdgeScores, edge_scores
from clue_fast.localization.circuit.corruption import CorruptedSet, corrupt
from clue_fast.localization.circuit.discovery import CircuitSettings, Discovery, discover
from clue_fast.localization.circuit.gates import Circuit, find_circuits, make_circuit, prune, strongest_edges
from clue_fast.localization.circuit.graph import Graph
from clue_fast.localization.circuit.logic import Formula, make_formula, node_categories
from clue_fast.localization.circuit.solve import Solution, solve
from clue_fast.localization.circuit.units import select_units

__all__ = [
    "Circuit",
    "CircuitSettings",
    "CorruptedExample",
    "CorruptedSet",
    "Discovery",
    "EdgeScores",
    "Formula",
    "Graph",
    "Solution",
    "corrupt",
    "discover",
    "edge_scores",
    "find_circuits",
    "make_circuit",
    "make_formula",
    "node_categories",
    "prune",
    "select_units",
    "solve",
    "strongest_edges",
]
