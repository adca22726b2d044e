"""Whether a model still writes: the perplexity of a text, and how many of its answers are gibberish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from clue_fast.data import IGNORED_LABEL, Example
from clue_fast.data.collator import longest
from clue_fast.errors import DataError
from clue_fast.evaluation.answers import words
from clue_fast.evaluation.likelihood import AnswerScore, score_examples
from clue_fast.evaluation.metrics import Metrics, mean
from clue_fast.evaluation.registry import metric

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
TOKENS_AT_ONCE = 2048
NGRAM = 3
REPEATED = 0.5
LETTERS = 0.5


def text_windows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: str, window: int = WINDOW, tokens: int | None = None
) -> list[Example]:
    """A text as examples of so many tokens, of which each is predicted from those before it in its window.

    Each window begins with the start token, if the tokenizer puts one in front of a text; otherwise its first token is
    not predicted.

    Args:
        model, tokenizer: a causal language model and its own.
        text: any.
        window: tokens that are read together, if the model has positions for as many.
        tokens: takes only so many from the beginning; None: all.

    Raises:
        DataError: the text has no token that is predicted.
    """
    empty = tokenizer("")["input_ids"]
    start = [empty[0]] if empty and empty[0] == tokenizer.bos_token_id else []
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    room = (longest(model, window + len(start)) or 0) - len(start)
    pieces = [ids[first : first + room] for first in range(0, len(ids), max(1, room))]
    examples: list[Example] = [
        {"input_ids": [*start, *piece], "labels": [IGNORED_LABEL, *[*start, *piece][1:]]} for piece in pieces
    ]
    examples = [example for example in examples if len(example["input_ids"]) > 1]
    if not examples:
        raise DataError(f"the text {text[:40]!r} has no token that is predicted from others; give a longer one")
    return examples


def perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = WINDOW,
    tokens: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> float:
    """Exp of the mean loss a token of a text, in windows that know nothing of one another.

    Jelinek et al. 1977. It depends on the tokenizer and on the window: compare models by the same ones.

    Args:
        model, tokenizer, text, window, tokens: see ``text_windows``.
        batch_size: windows a batch.
        progress: shows a bar if it takes longer than a second.

    Raises:
        DataError: see ``text_windows``.
    """
    examples = text_windows(model, tokenizer, text, window, tokens)
    return _perplexity(read_windows(model, tokenizer, examples, batch_size=batch_size, progress=progress))


def read_windows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> list[AnswerScore]:
    """Scores the tokens of windows, of few at once: every token of them has logits."""
    longest_window = max(len(example["input_ids"]) for example in examples)
    at_once = min(batch_size, max(1, TOKENS_AT_ONCE // longest_window))
    return score_examples(
        model, tokenizer, examples, batch_size=at_once, progress=progress, description="reading a text"
    )


def _perplexity(scores: Sequence[AnswerScore]) -> float:
    log_probs = [value for score in scores for value in score.log_probs]
    return math.exp(-mean(log_probs))


def is_gibberish(answer: str) -> bool:
    """Whether a text repeats itself or is mostly signs.

    It is where more than half of its runs of three words were there before (rep-3 of Welleck et al. 2020, arXiv
    1908.04319), or less than half of what is not blank are letters, digits or marks. That needs no classifier and gives
    the same answer everywhere; nonsense in whole sentences passes, for which the perplexity of a text is to be looked
    at. An answer of nothing is none: it says nothing, and recalls nothing.
    """
    seen = [character for character in answer if not character.isspace()]
    if not seen:
        return False
    own = words(answer)
    if sum(map(len, own)) < LETTERS * len(seen):
        return True
    runs = [tuple(own[first : first + NGRAM]) for first in range(len(own) - NGRAM + 1)]
    return bool(runs) and 1.0 - len(set(runs)) / len(runs) > REPEATED


@metric("gibberish", better="lower", better_forgotten="lower", default=False)
def gibberish(metrics: Metrics) -> Sequence[float]:
    """Share of the greedy answers that repeat themselves or are mostly signs.

    See ``is_gibberish``; open-unlearning asks a classifier instead.
    """
    return [float(is_gibberish(answer)) for answer in metrics.answers]


@metric(
    "perplexity",
    better="lower",
    better_forgotten="lower",
    sets="text",
    needs=["tokens"],
    name="perplexity",
)
def _text_perplexity(metrics: Metrics) -> float:
    """Exp of the mean loss a token of a general text, where one is given.

    See ``perplexity``.
    """
    return _perplexity(metrics.scores)
