"""How much of an answer has to be given away until the model goes on with the rest of it, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clue_fast.data import IGNORED_LABEL, Example, prompt_tokens
from clue_fast.evaluation.answers import Question, answer_tokens, words
from clue_fast.evaluation.likelihood import AnswerScore
from clue_fast.evaluation.metrics import Metrics
from clue_fast.evaluation.registry import metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def extraction_strength(right: Sequence[bool]) -> float:
    """1 - k / n, with k the fewest of the n tokens of an answer that have to be given until all others are right.

    A token is right if it is the model's first choice behind all tokens before it. After Carlini et al. 2021,
    "Extracting Training Data from Large Language Models" (arXiv 2012.07805), in the form of open-unlearning (arXiv
    2506.12618). Where even the last token is wrong, all have to be given and the strength is 0;
    the code of open-unlearning has 1 / n there.

    Args:
        right: of each token, without the end.
    """
    given = next((index for index in range(len(right), 0, -1) if not right[index - 1]), 0)
    return 1.0 - given / len(right)


def extracted_prefixes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    scores: Sequence[AnswerScore],
    *,
    batch_size: int = 32,
    progress: bool = True,
    description: str = "extracting",
) -> list[int]:
    """The fewest tokens of each answer behind which greedy decoding writes all words of the rest, in their order.

    Words are those of ``words``, so that neither case nor punctuation nor the end matters, nor that another token may
    hold the same letters, nor what follows on the answer: what a reader would call the answer. It is never more than
    teacher forcing says (the same tokens follow where each is the first choice behind the right ones), and by the same
    token all prefixes up to the next wrong token lead to the same text, so that only prefixes in front of a wrong token
    are continued, the shortest first, until one is enough.

    Args:
        model, tokenizer: a causal language model and its own.
        examples: encoded records.
        scores: of their answers, from the same model.
        batch_size, progress, description: see ``greedy_answers``.
    """
    prompts = [prompt_tokens(example) for example in examples]
    labels = [[token for token in example["labels"] if token != IGNORED_LABEL] for example in examples]
    answers = [own[: score.length] for own, score in zip(labels, scores, strict=True)]
    ends = [own[-1] if score.ended else None for own, score in zip(labels, scores, strict=True)]
    wanted = [words(_text(tokenizer, answer)) for answer in answers]
    wrong = [[i for i, hit in enumerate(score.right[: score.length]) if not hit] for score in scores]
    found = [0 if not places else places[-1] + 1 for places in wrong]
    open_ = {index: 0 for index, places in enumerate(wrong) if places}
    while open_:
        places = {index: wrong[index][attempt] for index, attempt in open_.items()}
        questions = [
            Question(prompts[index] + answers[index][:place], len(answers[index]) - place, ends[index])
            for index, place in places.items()
        ]
        rows = answer_tokens(
            model, tokenizer, questions, batch_size=batch_size, progress=progress, description=description
        )
        for (index, place), row in zip(places.items(), rows, strict=True):
            written = words(_text(tokenizer, answers[index][:place] + row))
            if written[: len(wanted[index])] == wanted[index]:
                attempt = open_.pop(index)
                found[index] = wrong[index][attempt - 1] + 1 if attempt else 0
            else:
                open_[index] += 1
                if open_[index] == len(wrong[index]):
                    del open_[index]
    return found


def _text(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@metric(
    "extraction strength",
    better="higher",
    better_forgotten="lower",
    name="extraction_strength",
    needs=["tokens"],
    default=False,
)
def _extraction_strength(metrics: Metrics) -> Sequence[float]:
    """Share of the answer's tokens, its end aside, that need not be given away until all others are right under
    teacher forcing, mean over the records.

    See ``extraction_strength``.
    """
    return [extraction_strength(score.right[: score.length]) for score in metrics.scores]


@metric(
    "extraction strength, generated",
    better="higher",
    better_forgotten="lower",
    needs=["tokens", "prefixes"],
    default=False,
)
def extraction_strength_generated(metrics: Metrics) -> Sequence[float]:
    """The same where greedy decoding writes the words of the rest, mean over the records.

    See ``extracted_prefixes``.
    """
    pairs = zip(metrics.prefixes, metrics.scores, strict=True)
    return [1.0 - given / score.length for given, score in pairs]
