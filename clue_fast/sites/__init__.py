"""Finds the sites of a model: the modules whose neurons can be measured, selected and trained.

A site is recognized by what it is made of and what that computes (which projections, how their shapes fit, what
happens between them), never by the name of its class, so that a model that nobody has seen yet is found as well.
"""

from clue_fast.deprecated import renamed_names
from clue_fast.internals import device_of, evaluation_mode, mixed_class, model_fingerprint, unwrap
from clue_fast.ops import ACTIVATIONS
from clue_fast.sites.find import DEFAULT_KINDS, KINDS, Survey, check_sites, find_sites, survey
from clue_fast.sites.mlp import Unmatched
from clue_fast.sites.site import HEAD_FAMILIES, ParamSlice, Site

__all__ = [
    "ACTIVATIONS",
    "DEFAULT_KINDS",
    "HEAD_FAMILIES",
    "KINDS",
    "ParamSlice",
    "Site",
    "Survey",
    "Unmatched",
    "check_sites",
    "device_of",
    "evaluation_mode",
    "find_sites",
    "mixed_class",
    "model_fingerprint",
    "survey",
    "unwrap",
]

__getattr__ = renamed_names(__name__, Part="ParamSlice")
