"""The logic of a forget circuit and of retain circuits: which nodes may stay on, which must go off.

Every node of the forget circuit has a variable f, every node of a retain circuit a variable r, true if the node stays
on. The output of the forget circuit is to be off, that of each retain circuit on (CLUE, arXiv 2509.20977). A node has
the value of every gate that feeds it:

    AND    node = x1 ∧ x2 ∧ ...
    OR     node = x1 ∨ x2 ∨ ...
    ADDER  as OR in the forget circuit, where each input alone still carries some of it, so that all must go off;
           as AND in a retain circuit, where each input is some of it, so that all must stay on

A node of both is in conflict if f and r differ. As few as possible should be: a weighted formula in conjunctive normal
form, whose hard clauses are the gates and outputs, and with a soft clause for each common node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from clue_fast.errors import CircuitError
from clue_fast.localization.circuit.gates import ADDER, AND, OR, Circuit
from clue_fast.localization.circuit.graph import OUTPUT

Clause = list[int]


@dataclass
class Formula:
    """Clauses over variables 1, 2, ...; a literal is a variable or its negative.

    Attributes:
        hard: clauses that must hold.
        soft: clauses of one literal of which as many as possible should hold.
        forget: variable of each node of the forget circuit.
        retain: variable of each node of a retain circuit; circuits share the variables of the nodes they share.
        conflict: variable of each common node, true where the other two differ.
        variables: number of variables.
    """

    hard: list[Clause] = field(default_factory=list)
    soft: list[Clause] = field(default_factory=list)
    forget: dict[str, int] = field(default_factory=dict)
    retain: dict[str, int] = field(default_factory=dict)
    conflict: dict[str, int] = field(default_factory=dict)
    variables: int = 0

    def variable(self) -> int:
        """Returns a new variable."""
        self.variables += 1
        return self.variables


def make_formula(forget: Circuit, retains: Sequence[Circuit]) -> Formula:
    """Writes the circuits as one formula.

    The output nodes are not counted as a conflict: theirs is what is asked for.

    Raises:
        CircuitError: there is no retain circuit, or a circuit does not reach the output.
    """
    if not retains:
        raise CircuitError("conflicts need at least one retain circuit")
    formula = Formula()
    _add_circuit(formula, formula.forget, forget, ADDER_AS["forget"], OUTPUT_ON["forget"])
    for retain in retains:
        _add_circuit(formula, formula.retain, retain, ADDER_AS["retain"], OUTPUT_ON["retain"])
    for node, f in formula.forget.items():
        r = formula.retain.get(node)
        if r is not None and node != OUTPUT:
            differ = formula.conflict[node] = formula.variable()
            formula.hard += [[-f, r, differ], [f, -r, differ]]
            formula.soft.append([-differ])
    return formula


ADDER_AS = {"forget": OR, "retain": AND}
OUTPUT_ON = {"forget": False, "retain": True}


def gate_clauses(gate: str, node: int, inputs: Sequence[int]) -> list[Clause]:
    """Clauses for node = x1 ∧ x2 ∧ ... (AND) or node = x1 ∨ x2 ∨ ... (OR)."""
    if gate == AND:
        return [[-node, x] for x in inputs] + [[node, *(-x for x in inputs)]]
    return [[node, -x] for x in inputs] + [[-node, *inputs]]


def _add_circuit(formula: Formula, variables: dict[str, int], circuit: Circuit, adder: str, on: bool) -> None:
    if OUTPUT not in circuit.nodes:
        raise CircuitError("a circuit has no path to the output")
    for node in circuit.nodes:
        if node not in variables:
            variables[node] = formula.variable()
    formula.hard.append([variables[OUTPUT] if on else -variables[OUTPUT]])
    for node, gates in circuit.gates().items():
        for gate, inputs in gates.items():
            own = adder if gate == ADDER else gate
            formula.hard += gate_clauses(own, variables[node], [variables[source] for source in inputs])


def node_categories(formula: Formula, values: Mapping[int, bool]) -> dict[str, str]:
    """The category of every node but the output, from an assignment.

    conflict: f and r differ. forget: it goes off, and no retain circuit needs it on. retain: it stays on, and the
    forget circuit does not need it off. irrelevant: it may go off in a retain circuit or stay on in the forget
    circuit, and is not part of the other. The published code calls the latter forget and retain nodes by their value,
    which would train nodes on forget data that the forget circuit does not contain.
    """
    categories = {}
    for node in dict.fromkeys([*formula.forget, *formula.retain]):
        f = values[formula.forget[node]] if node in formula.forget else None
        r = values[formula.retain[node]] if node in formula.retain else None
        if node == OUTPUT:
            continue
        if f is None:
            categories[node] = "retain" if r else "irrelevant"
        elif r is None:
            categories[node] = "irrelevant" if f else "forget"
        elif f != r:
            categories[node] = "conflict"
        else:
            categories[node] = "retain" if r else "forget"
    return categories
