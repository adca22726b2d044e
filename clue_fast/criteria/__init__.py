"""Criteria: formulas from what was measured of a unit to one score, and the passes over the data that measure it."""

from clue_fast.criteria import formulas  # noqa: F401  registers the criteria of the field
from clue_fast.criteria.circuit import criterion as _circuit  # noqa: F401  and that of circuits
from clue_fast.criteria.circuit.discovery import CircuitSettings
from clue_fast.criteria.measure import measure, record_groups
from clue_fast.criteria.measurements import MEASUREMENTS, Measurement
from clue_fast.criteria.passes import TARGETS
from clue_fast.criteria.registry import CRITERIA, Criterion, Measured, Units, criterion, importances, score

__all__ = [
    "CRITERIA",
    "MEASUREMENTS",
    "TARGETS",
    "CircuitSettings",
    "Criterion",
    "Measured",
    "Measurement",
    "Units",
    "criterion",
    "importances",
    "measure",
    "record_groups",
    "score",
]
