"""From a model and two data sets to a selection: criteria that score units, and the pass over the data."""

from clue_fast.localization.criteria import CRITERIA, Criterion, score
from clue_fast.localization.measure import localize, measure, record_groups

__all__ = ["CRITERIA", "Criterion", "localize", "measure", "record_groups", "score"]
