"""What a model knows of a set of records, before and after unlearning."""

from clue_fast.deprecated import renamed_names
from clue_fast.evaluation import memorization  # noqa: F401 (its metrics stand first in the table)
from clue_fast.evaluation.answers import ANSWERED, answered, greedy_answers, rouge_recall, sampled_answers, words
from clue_fast.evaluation.attacks import ATTACKS, Attacked, Attempt, Target, attack, attack_names, register_attack
from clue_fast.evaluation.comparison import Comparison, Row, compare, evaluate_model
from clue_fast.evaluation.extraction import extraction_strength
from clue_fast.evaluation.fluency import is_gibberish, perplexity
from clue_fast.evaluation.likelihood import (
    AnswerScore,
    forget_quality,
    mean_truth_ratio,
    option_probability,
    score_answers,
    truth_ratio,
    truth_ratios,
)
from clue_fast.evaluation.measurement import check_evaluation, check_retrained, check_tokenizers, evaluate, relate
from clue_fast.evaluation.membership import area_under_curve, min_k_score, privacy_leakage, zlib_score
from clue_fast.evaluation.metrics import Metrics, metric_title
from clue_fast.evaluation.registry import METRICS, Metric, Skipped, metric, metric_names
from clue_fast.evaluation.relearning import Relearning, relearn
from clue_fast.evaluation.utility import model_utility

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
    "Skipped",
    "Target",
    "answered",
    "area_under_curve",
    "attack",
    "attack_names",
    "check_evaluation",
    "check_retrained",
    "check_tokenizers",
    "compare",
    "evaluate",
    "evaluate_model",
    "extraction_strength",
    "forget_quality",
    "greedy_answers",
    "is_gibberish",
    "mean_truth_ratio",
    "metric",
    "metric_names",
    "metric_title",
    "min_k_score",
    "model_utility",
    "option_probability",
    "perplexity",
    "privacy_leakage",
    "register_attack",
    "relate",
    "relearn",
    "rouge_recall",
    "sampled_answers",
    "score_answers",
    "truth_ratio",
    "truth_ratios",
    "words",
    "zlib_score",
]

__getattr__ = renamed_names(__name__, COMPARED="METRICS")
