"""Circuits: which edges of a model carry an answer, and in which nodes forgetting and keeping conflict.

After CLUE (arXiv 2509.20977): ``discover`` finds the circuits of a forget set and of retain sets by edge attribution in
both directions, reads their gates, and solves their logic; ``select_units`` makes a selection of it. The criterion
``circuit`` is both.
"""

from clue_fast.criteria.circuit.attribution import CorruptedExample, edge_scores
from clue_fast.criteria.circuit.corruption import CorruptedSet, corrupt
from clue_fast.criteria.circuit.criterion import CIRCUIT, CircuitCriterion
from clue_fast.criteria.circuit.discovery import Discovery, discover, select_units
from clue_fast.criteria.circuit.graph import (
    Circuit,
    EdgeScores,
    Graph,
    find_circuits,
    make_circuit,
    prune,
    strongest_edges,
)
from clue_fast.criteria.circuit.logic import Formula, Solution, make_formula, node_categories, solve

__all__ = [
    "CIRCUIT",
    "Circuit",
    "CircuitCriterion",
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
