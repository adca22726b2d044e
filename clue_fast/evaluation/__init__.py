"""What a model knows of a set of records, before and after unlearning."""

from clue_fast.evaluation.answers import greedy_answers, sampled_answers
from clue_fast.evaluation.comparison import COMPARED, Comparison, Row, compare, metric_title
from clue_fast.evaluation.metrics import ANSWERED, Metrics, evaluate
from clue_fast.evaluation.rouge import rouge_recall, words
from clue_fast.evaluation.teacher_forcing import AnswerScore, score_answers
from clue_fast.evaluation.truth import forget_quality, truth_ratio, truth_ratios

__all__ = [
    "ANSWERED",
    "COMPARED",
    "AnswerScore",
    "Comparison",
    "Metrics",
    "Row",
    "compare",
    "evaluate",
    "forget_quality",
    "greedy_answers",
    "metric_title",
    "rouge_recall",
    "sampled_answers",
    "score_answers",
    "truth_ratio",
    "truth_ratios",
    "words",
]
