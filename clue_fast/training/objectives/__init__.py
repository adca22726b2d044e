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

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clue_fast.errors import UnknownNameError
from clue_fast.training.objectives.base import Objective, Trained
from clue_fast.training.objectives.distillation import KL, UNDIAL
from clue_fast.training.objectives.likelihood import NPO, WGA, GradientAscent, GradientDifference, SimNPO
from clue_fast.training.objectives.predictions import Batch, Predictions, predict
from clue_fast.training.objectives.refusal import DPO, REFUSALS, Refusal
from clue_fast.training.objectives.representation import RMU

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
    "get_objective",
    "predict",
]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (GradientAscent, GradientDifference, KL, NPO, SimNPO, WGA, UNDIAL, Refusal, DPO, RMU)
}


def get_objective(objective: str | Objective, **overrides: Any) -> Objective:
    """Returns an objective by its name, or the given one, with some of its parameters replaced.

    Raises:
        UnknownNameError: no objective has that name.
        TypeError: the objective has no such parameter.
    """
    if isinstance(objective, Objective):
        return replace(objective, **overrides)
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective](**overrides)
