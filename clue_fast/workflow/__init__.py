"""The whole path: a model, a forget set and a retain set in; an unlearned plain checkpoint, and evidence, out."""

from clue_fast.workflow.loading import check_weights, load_model, load_sets
from clue_fast.workflow.settings import DEFAULT_OBJECTIVE, default_epochs, default_learning_rate
from clue_fast.workflow.unlearning import UnlearnResult, evaluate_model, unlearn

__all__ = [
    "DEFAULT_OBJECTIVE",
    "UnlearnResult",
    "check_weights",
    "default_epochs",
    "default_learning_rate",
    "evaluate_model",
    "load_model",
    "load_sets",
    "unlearn",
]
