"""What a model knows of a set of records, before and after unlearning."""

from clue_fast.evaluation.answers import ANSWERED, answered, greedy_answers, rouge_recall, sampled_answers, words
from clue_fast.evaluation.likelihood import (
    AnswerScore,
    forget_quality,
    mean_truth_ratio,
    score_answers,
    truth_ratio,
    truth_ratios,
)
from clue_fast.evaluation.metrics import (
    COMPARED,
    Comparison,
    Metrics,
    Row,
    check_evaluation,
    compare,
    evaluate,
    metric_title,
)
from clue_fast.evaluation.relearning import Relearning, relearn

__all__ = [
    "ANSWERED",
    "COMPARED",
    "AnswerScore",
    "Comparison",
    "Metrics",
    "Relearning",
    "Row",
    "answered",
    "check_evaluation",
    "compare",
    "evaluate",
    "forget_quality",
    "greedy_answers",
    "mean_truth_ratio",
    "metric_title",
    "relearn",
    "rouge_recall",
    "sampled_answers",
    "score_answers",
    "truth_ratio",
    "truth_ratios",
    "words",
]
