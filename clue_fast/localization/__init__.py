"""From a model and two data sets to a selection: criteria that score units, and the passes over the data."""

from clue_fast.localization import formulas  # noqa: F401  registers the criteria of the field
from clue_fast.localization.circuit import CircuitSettings
from clue_fast.localization.criteria import CRITERIA, Criterion, Measured, criterion, importances, score
from clue_fast.localization.locate import CIRCUIT, check_criterion, localize
from clue_fast.localization.measure import measure, record_groups
from clue_fast.localization.targets import TARGETS
from clue_fast.localization.units import Units

__all__ = [
    "CIRCUIT",
    "CRITERIA",
    "TARGETS",
    "CircuitSettings",
    "Criterion",
    "Measured",
    "Units",
    "check_criterion",
    "criterion",
    "importances",
    "localize",
    "measure",
    "record_groups",
    "score",
]
