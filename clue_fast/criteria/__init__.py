"""Criteria: formulas from what was measured of a unit to one score, and the passes over the data that measure it."""

from clue_fast.criteria import formulas  # noqa: F401  registers the criteria of the field
from clue_fast.criteria.circuit.discovery import CircuitSettings
from clue_fast.criteria.measure import measure, record_groups
from clue_fast.criteria.registry import CRITERIA, TARGETS, Criterion, Measured, Units, criterion, importances, score

__all__ = [
    "CRITERIA",
    "TARGETS",
    "CircuitSettings",
    "Criterion",
    "Measured",
    "Units",
    "criterion",
    "importances",
    "measure",
    "record_groups",
    "score",
]
