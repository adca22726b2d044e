"""The operators: each has a definition in plain PyTorch and faster backends, see `clue_fast.ops.backend`."""

from clue_fast.ops.accumulators import FIELDS, GRADIENT_FIELDS, GRADIENT_SUMS, STATISTICS, SUMS, fields_of, sums_with
from clue_fast.ops.backend import BACKENDS, Choice, available, choose
from clue_fast.ops.channel_statistics import channel_attribution, channel_statistics
from clue_fast.ops.conflict_score import CLOSED_FORMS, CRITERIA_OPS, Scoring, conflict_score
from clue_fast.ops.gated_activation import ACTIVATIONS, gated_activation
from clue_fast.ops.sparse_linear import sparse_linear
from clue_fast.ops.sparse_optimizer import sparse_adamw_, sparse_sgd_

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "CLOSED_FORMS",
    "CRITERIA_OPS",
    "FIELDS",
    "GRADIENT_FIELDS",
    "GRADIENT_SUMS",
    "STATISTICS",
    "SUMS",
    "Choice",
    "Scoring",
    "available",
    "channel_attribution",
    "channel_statistics",
    "choose",
    "conflict_score",
    "fields_of",
    "gated_activation",
    "sparse_adamw_",
    "sparse_linear",
    "sparse_sgd_",
    "sums_with",
]
