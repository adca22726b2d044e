"""Criteria: formulas from what was measured of a unit to one score, and the passes over the data that measure it.

A patched model scores by them, so the package takes ``patch`` from here.
"""

from clue_fast.criteria import formulas  # noqa: F401  registers the criteria of the field
from clue_fast.criteria.circuit import discover  # noqa: F401  registers the logic of circuits
from clue_fast.criteria.measure import measure, record_groups
from clue_fast.criteria.measurements import MEASUREMENTS, Measurement
from clue_fast.criteria.passes import TARGETS
from clue_fast.criteria.registry import (
    CRITERIA,
    Criterion,
    Measured,
    Units,
    check_criterion,
    criterion,
    importances,
    score,
)
from clue_fast.recording import Patched, patch, unpatch

Patched.scorer = staticmethod(score)

__all__ = [
    "CRITERIA",
    "MEASUREMENTS",
    "TARGETS",
    "Criterion",
    "Measured",
    "Measurement",
    "Patched",
    "Units",
    "check_criterion",
    "criterion",
    "importances",
    "measure",
    "patch",
    "record_groups",
    "score",
    "unpatch",
]
