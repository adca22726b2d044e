"""Objectives: the loss of a batch of what must be forgotten, beside a batch of what must be kept.

Notation: x a record, |x| its number of answer tokens, log p(x) the sum of their log-probabilities under the
model, log q(x) the same under the original model. The loss of a record is that of TOFU (arXiv 2401.06121):
the mean over its answer tokens, -log p(x) / |x|; a batch is the mean over its records. So a step does not
depend on padding, nor on how a batch is cut for gradient accumulation. Log-ratios of preferences (NPO, DPO) are of
whole answers, sums over their tokens, as in their papers.

The public implementations (locuslab/tofu, locuslab/open-unlearning, licong-lin/negative-preference-optimization,
OPTML-Group/Unlearn-Simple) take the loss that transformers returns for likelihoods: the mean over all answer tokens
of a batch, in which long answers weigh more. With one record a batch it is the same. Further differences stand with
each objective.
"""

from clue_fast.objectives.base import OBJECTIVES, Objective, default_objective, get_objective, register_objective
from clue_fast.objectives.losses import (
    DPO,
    KL,
    NPO,
    REFUSALS,
    RMU,
    UNDIAL,
    WGA,
    GradientAscent,
    GradientDifference,
    Refusal,
    SimNPO,
)
from clue_fast.objectives.original import Trained
from clue_fast.objectives.passes import predict
from clue_fast.objectives.predictions import Batch, Predictions

__all__ = [
    "DPO",
    "KL",
    "NPO",
    "OBJECTIVES",
    "REFUSALS",
    "RMU",
    "UNDIAL",
    "WGA",
    "Batch",
    "GradientAscent",
    "GradientDifference",
    "Objective",
    "Predictions",
    "Refusal",
    "SimNPO",
    "Trained",
    "default_objective",
    "get_objective",
    "predict",
    "register_objective",
]
