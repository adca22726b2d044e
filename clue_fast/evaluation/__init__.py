"""What a model knows of a set of records, before and after unlearning."""

from clue_fast.evaluation.answers import greedy_answers, sampled_answers
from clue_fast.evaluation.comparison import COMPARED, Comparison, Row, compare, metric_title
from clue_fast.evaluation.metrics import Metrics, check_evaluation, evaluate
from clue_fast.evaluation.relearning import Relearning, relearn
from clue_fast.evaluation.rouge import ANSWERED, answered, rouge_recall, words
from clue_fast.evaluation.teacher_forcing import AnswerScore, score_answers
from clue_fast.evaluation.truth import forget_quality, mean_truth_ratio, truth_ratio, truth_ratios

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
