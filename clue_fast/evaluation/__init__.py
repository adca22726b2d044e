"""What a model knows of a set of records, before and after unlearning."""

from clue_fast.deprecated import renamed_names
from clue_fast.evaluation.answers import ANSWERED, answered, greedy_answers, rouge_recall, sampled_answers, words
from clue_fast.evaluation.attacks import ATTACKS, Attacked, Attempt, Target, attack, attack_names, register_attack
from clue_fast.evaluation.comparison import Comparison, Row, compare, evaluate_model
from clue_fast.evaluation.likelihood import (
    AnswerScore,
    forget_quality,
    mean_truth_ratio,
    score_answers,
    truth_ratio,
    truth_ratios,
)
from clue_fast.evaluation.metrics import METRICS, Metric, Metrics, check_evaluation, evaluate, metric, metric_title
from clue_fast.evaluation.relearning import Relearning, relearn

__all__ = [
    "ANSWERED",
    "ATTACKS",
    "METRICS",
    "AnswerScore",
    "Attacked",
    "Attempt",
    "Comparison",
    "Metric",
    "Metrics",
    "Relearning",
    "Row",
    "Target",
    "answered",
    "attack",
    "attack_names",
    "check_evaluation",
    "compare",
    "evaluate",
    "evaluate_model",
    "forget_quality",
    "greedy_answers",
    "mean_truth_ratio",
    "metric",
    "metric_title",
    "register_attack",
    "relearn",
    "rouge_recall",
    "sampled_answers",
    "score_answers",
    "truth_ratio",
    "truth_ratios",
    "words",
]

__getattr__ = renamed_names(__name__, COMPARED="METRICS")
