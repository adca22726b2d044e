"""The logic of a forget circuit and of retain circuits: which nodes may stay on, which must go off.

Two readings, both a formula in conjunctive normal form in which the output of the forget circuit is off and that of
each retain circuit on. A node of both is in conflict if one needs it off and the other on; as few as possible should
be: ``solve`` finds the fewest, exactly, or the best bounds that a time limit allows.

    published  CLUE (arXiv 2509.20977). Every node of the forget circuit has a value f, every node of a retain circuit a
               value r, true if the node stays on. A node has the value of every gate that feeds it (Tseitin
               transformation), so that in the end the values of the first nodes decide those of all others.
    cut        What training changes are nodes, not their inputs: a node may go off although its inputs stay on. f is
               true if the node is left alone, r if a retain circuit needs it. Nodes of the forget circuit alone are not
               left alone. The output goes off if no path of nodes that are left alone turns it on; the fewest common
               nodes that a retain circuit needs, and then the fewest common nodes, are not left alone.

The gates:

    AND    node = x1 ∧ x2 ∧ ...
    OR     node = x1 ∨ x2 ∨ ...
    ADDER  as OR in the forget circuit, where each input alone still carries some of it, so that all must go off;
           as AND in a retain circuit, where each input is some of it, so that all must stay on

The embedding is no node of the logic: no unit belongs to it, and in the published code no circuit has it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Timer
from typing import Any

from clue_fast.config import TIME_LIMIT
from clue_fast.criteria.circuit.graph import ADDER, AND, EMBEDDING, OR, OUTPUT, Circuit
from clue_fast.errors import CircuitError, UnknownNameError

logger = logging.getLogger(__name__)
LOGICS = ("published", "cut")
Clause = list[int]

Gates = Mapping[str, Mapping[str, Sequence[str]]]
"""The inputs of each node by gate."""


@dataclass
class Formula:
    """Clauses over variables 1, 2, ...; a literal is a variable or its negative.

    Attributes:
        hard: clauses that must hold.
        soft: clauses of one literal, no conflict of a node, of which as many as possible should hold.
        wanted: clauses of one literal of which as many as possible should hold without a further conflict.
        forget: variable f of each node of the forget circuit.
        retain: variable r of each node of a retain circuit; circuits share the variables of the nodes they share.
        conflict: variable of each common node but the output, true if it is in conflict.
        variables: number of variables.
    """

    hard: list[Clause] = field(default_factory=list)
    soft: list[Clause] = field(default_factory=list)
    wanted: list[Clause] = field(default_factory=list)
    forget: dict[str, int] = field(default_factory=dict)
    retain: dict[str, int] = field(default_factory=dict)
    conflict: dict[str, int] = field(default_factory=dict)
    variables: int = 0

    def variable(self) -> int:
        """Returns a new variable."""
        self.variables += 1
        return self.variables


def make_formula(forget: Circuit, retains: Sequence[Circuit], logic: str = "published") -> Formula:
    """Writes the circuits as one formula.

    The output nodes are not counted as a conflict: theirs is what is asked for.

    Args:
        forget: circuit of the forget set.
        retains: circuits of the retain sets.
        logic: one of ``LOGICS``.

    Raises:
        CircuitError: there is no retain circuit, or a circuit does not reach the output.
        UnknownNameError: no such logic.
    """
    if logic not in LOGICS:
        raise UnknownNameError("logic", logic, LOGICS)
    if not retains:
        raise CircuitError("conflicts need at least one retain circuit")
    gates, *others = (_gates(circuit) for circuit in (forget, *retains))
    formula = Formula()
    _name(formula, formula.forget, gates)
    for own in others:
        _name(formula, formula.retain, own)
    for node in formula.forget:
        if node in formula.retain and node != OUTPUT:
            formula.conflict[node] = formula.variable()
            formula.soft.append([-formula.conflict[node]])
    (_add_published if logic == "published" else _add_cut)(formula, gates, others)
    return formula


def _gates(circuit: Circuit) -> Gates:
    """The inputs of all nodes but the embedding; none of a node that only it feeds."""
    inner = Circuit({edge: gate for edge, gate in circuit.edges.items() if edge[0] != EMBEDDING})
    if OUTPUT not in inner.nodes:
        raise CircuitError("a circuit has no path to the output from a node other than the embedding")
    return {**{node: {} for node in circuit.nodes if node != EMBEDDING}, **inner.gates()}


def _name(formula: Formula, variables: dict[str, int], gates: Gates) -> None:
    for node in gates:
        if node not in variables:
            variables[node] = formula.variable()


def _add_published(formula: Formula, forget: Gates, retains: Sequence[Gates]) -> None:
    formula.hard += [[-formula.forget[OUTPUT]], [formula.retain[OUTPUT]]]
    sides = [(formula.forget, forget, OR), *((formula.retain, own, AND) for own in retains)]
    for variables, gates, adder in sides:
        for node, inputs_by_gate in gates.items():
            for gate, inputs in inputs_by_gate.items():
                own = adder if gate == ADDER else gate
                formula.hard += gate_clauses(own, variables[node], [variables[source] for source in inputs])
    for node, differ in formula.conflict.items():
        f, r = formula.forget[node], formula.retain[node]
        formula.hard += [[-f, r, differ], [f, -r, differ], [f, r, -differ], [-f, -r, -differ]]


def gate_clauses(gate: str, node: int, inputs: Sequence[int]) -> list[Clause]:
    """Clauses for node = x1 ∧ x2 ∧ ... (AND) or node = x1 ∨ x2 ∨ ... (OR)."""
    if gate == AND:
        return [[-node, x] for x in inputs] + [[node, *(-x for x in inputs)]]
    return [[node, -x] for x in inputs] + [[-node, *inputs]]


def _add_cut(formula: Formula, forget: Gates, retains: Sequence[Gates]) -> None:
    on = {node: formula.variable() for node in forget}
    formula.hard += [[-on[OUTPUT]], [formula.forget[OUTPUT]], [formula.retain[OUTPUT]]]
    for node, inputs_by_gate in forget.items():
        goes_on = [on[node], -formula.forget[node]]
        if not inputs_by_gate:
            formula.hard.append(goes_on)
        for gate, inputs in inputs_by_gate.items():
            sources = [-on[source] for source in inputs]
            formula.hard += [[*goes_on, *sources]] if gate == AND else [[*goes_on, source] for source in sources]
    for own in retains:
        for node, inputs_by_gate in own.items():
            for gate, inputs in inputs_by_gate.items():
                needed = [formula.retain[source] for source in inputs]
                unless = -formula.retain[node]
                formula.hard += [[unless, *needed]] if gate == OR else [[unless, source] for source in needed]
    for node, f in formula.forget.items():
        if node not in formula.retain:
            formula.hard.append([-f])
        elif node != OUTPUT:
            r, conflict = formula.retain[node], formula.conflict[node]
            formula.hard += [[f, -r, conflict], [-conflict, -f], [-conflict, r]]
            formula.wanted.append([f])


def node_categories(formula: Formula, values: Mapping[int, bool]) -> dict[str, str]:
    """The category of every node but the output, from an assignment.

    conflict: a common node in conflict. forget: it goes off, and no retain circuit needs it on. retain: it stays on,
    and a retain circuit needs it. irrelevant: none of these. The published code calls a node that need not change a
    forget or retain node by its value, which would train nodes on forget data that the forget circuit does not contain.
    """
    categories = {}
    for node in dict.fromkeys([*formula.forget, *formula.retain]):
        if node == OUTPUT:
            continue
        stays = node not in formula.forget or values[formula.forget[node]]
        needed = node in formula.retain and values[formula.retain[node]]
        if node in formula.conflict and values[formula.conflict[node]]:
            categories[node] = "conflict"
        elif needed:
            categories[node] = "retain"
        else:
            categories[node] = "irrelevant" if stays else "forget"
    return categories


@dataclass(frozen=True)
class Solution:
    """An assignment and how good it is.

    Attributes:
        values: of every variable.
        conflicts: number of common nodes in conflict.
        lower_bound: no assignment has fewer conflicts; equal to ``conflicts`` if that is proven to be the least.
    """

    values: dict[int, bool]
    conflicts: int
    lower_bound: int

    @property
    def optimal(self) -> bool:
        """Whether there are no fewer conflicts."""
        return self.lower_bound == self.conflicts


def solve(formula: Formula, time_limit: float = TIME_LIMIT) -> Solution:
    """Finds the assignment with the fewest conflicts by core-guided MaxSAT (RC2: Ignatiev et al. 2019, JSAT 11).

    Where the limit ends it, the best bound is used and said: conflicts are avoided one by one, in the order of the
    nodes, as long as a solution remains. Nodes about which nothing is asked are off in the forget circuit and on in
    retain circuits.

    Args:
        formula: see ``make_formula``.
        time_limit: in seconds, for the search of the optimum.

    Raises:
        CircuitError: the gates contradict each other, or python-sat is not installed.
    """
    started = time.monotonic()
    optimum, lower_bound = _optimum(formula, time_limit)
    if optimum is not None:
        return Solution(optimum, _conflicts(formula, optimum), _conflicts(formula, optimum))
    values = _greedy(formula)
    solution = Solution(values, _conflicts(formula, values), lower_bound)
    logger.warning(
        "no proof of the fewest conflicts within %.1f s (%.1f s in all): using an assignment with %d, and at least %d "
        "are needed",
        time_limit,
        time.monotonic() - started,
        solution.conflicts,
        solution.lower_bound,
    )
    return solution


def _optimum(formula: Formula, time_limit: float) -> tuple[dict[int, bool] | None, int]:
    """An optimal assignment, or None and a lower bound."""
    examples, wcnf = _pysat()
    weighted = wcnf()
    for clause in formula.hard:
        weighted.append(clause)
    for clause in formula.soft:
        weighted.append(clause, weight=len(formula.wanted) + 1)
    for clause in formula.wanted:
        weighted.append(clause, weight=1)
    with _limited(examples.RC2)(weighted, solver="g4") as solver:
        solver.oracle.set_phases(_phases(formula, solver.vmap.e2i))
        solver.time_limit, solver.timer = time_limit, Timer(time_limit, solver.interrupt)
        try:
            model = solver.compute(expect_interrupt=True)
        finally:
            solver.timer.cancel()
        if model is None and not solver.interrupted:
            raise CircuitError("the gates of the circuits contradict each other; no assignment satisfies all of them")
        if model is None:
            return None, int(solver.cost) // (len(formula.wanted) + 1)
    return _assignment(formula, model), 0


def _limited(rc2: Any) -> Any:
    """RC2 that ends after ``time_limit``.

    The ``timer`` interrupts a long call of the SAT solver; it starts with the first, before which an interrupt would be
    lost. Between short calls, which may leave the thread of the timer no room, the clock is looked at.
    """

    class LimitedRC2(rc2):  # type: ignore[misc]
        timer: Timer
        time_limit: float
        _started: float | None = None

        def _call_oracle(self, *arguments: Any, **keywords: Any) -> Any:
            if self._started is None:
                self._started = time.monotonic()
                self.timer.start()
            satisfied = super()._call_oracle(*arguments, **keywords)
            if time.monotonic() - self._started > self.time_limit:
                self.interrupted = True
            return satisfied

    return LimitedRC2


def _greedy(formula: Formula) -> dict[int, bool]:
    """An assignment none of whose conflicts can be avoided without another."""
    from pysat.solvers import Solver

    with Solver(name="g4", bootstrap_with=formula.hard) as solver:
        solver.set_phases(_phases(formula))
        kept: list[int] = []
        best: list[int] = []
        for clause in [None, *formula.soft, *formula.wanted]:
            wanted = kept if clause is None else [*kept, clause[0]]
            if solver.solve(assumptions=wanted):
                kept, best = wanted, solver.get_model()
            elif clause is None:
                raise CircuitError("the gates of the circuits contradict each other; no assignment satisfies them")
    return _assignment(formula, best)


def _phases(formula: Formula, renamed: dict[int, int] | None = None) -> list[int]:
    """What the solver tries first: off in the forget circuit, on in retain circuits, no conflict."""
    wanted = [-f for f in formula.forget.values()] + list(formula.retain.values())
    wanted += [-c for c in formula.conflict.values()]
    if renamed is None:
        return wanted
    return [renamed[abs(literal)] * (1 if literal > 0 else -1) for literal in wanted if abs(literal) in renamed]


def _assignment(formula: Formula, model: list[int]) -> dict[int, bool]:
    values = {abs(literal): literal > 0 for literal in model}
    for nodes, default in ((formula.forget, False), (formula.retain, True)):
        for variable in nodes.values():
            values.setdefault(variable, default)
    return values


def _conflicts(formula: Formula, values: dict[int, bool]) -> int:
    return sum(values[conflict] for conflict in formula.conflict.values())


def check_solver() -> None:
    """Raises CircuitError if python-sat is not installed."""
    _pysat()


def _pysat() -> tuple[Any, Any]:
    try:
        from pysat.examples import rc2
        from pysat.formula import WCNF
    except ImportError:
        raise CircuitError(
            'circuits need the MaxSAT solver of python-sat; install it with: pip install "clue-fast[circuits]"'
        ) from None
    return rc2, WCNF
