"""Patching: recording the activations of every site, fused into the forward where that is possible.

For one instance of a model: classes of libraries are never modified, so other models are untouched, and a deep copy
of a patched model is a patched model of its own.
"""

from clue_fast.recording.patched import Patched, check_strictly, patch, patched_of, unpatch
from clue_fast.recording.report import Report, SiteReport

__all__ = ["Patched", "Report", "SiteReport", "check_strictly", "patch", "patched_of", "unpatch"]
