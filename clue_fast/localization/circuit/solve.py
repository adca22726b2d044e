"""Solves a formula: the fewest conflicts, exactly, or the best bounds that a time limit allows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from threading import Timer
from typing import Any

from clue_fast.errors import CircuitError
from clue_fast.localization.circuit.logic import Formula

logger = logging.getLogger(__name__)

TIME_LIMIT = 60.0


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
        raise CircuitError("circuits need a MaxSAT solver; install the package python-sat") from None
    return rc2, WCNF
