"""How likely a model finds given answers, and what follows from that.

Loss and accuracy of each answer under teacher forcing, the probability of each of its tokens, and from the losses
the probability among options, truth ratio and forget quality, as TOFU defines them (Maini et al. 2024, arXiv
2401.06121).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from clue_fast.data import (
    Collator,
    Example,
    Record,
    answer_mask,
    batches_by_length,
    encode_for,
    padding_token,
    shift_labels,
)
from clue_fast.data.encoding import special_tokens
from clue_fast.errors import DataError
from clue_fast.evaluation.answers import evaluating, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerScore:
    """One answer under teacher forcing, its end-of-sequence token included.

    Attributes:
        loss: mean negative log-likelihood of its tokens, in nats.
        accuracy: share of its tokens that are the model's first choice.
        log_probs: log of the probability of each token, in nats.
        right: whether each token is the model's first choice.
        normalized: how far each log-probability is above the mean of those of all tokens that could stand there, in
            their standard deviations, both by the model's own probabilities; empty where that was not asked for.
        ended: the last token stands for no text and ends the answer.
    """

    loss: float
    accuracy: float
    log_probs: tuple[float, ...] = field(default=(), repr=False)
    right: tuple[bool, ...] = field(default=(), repr=False)
    normalized: tuple[float, ...] = field(default=(), repr=False)
    ended: bool = field(default=False, repr=False)

    @property
    def length(self) -> int:
        """The number of tokens without an end; of an answer that is nothing else, 1."""
        return max(1, len(self.log_probs) - self.ended)


def score_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "scoring answers",
) -> list[AnswerScore]:
    """Scores each record's completion given its prompt, in the order of the records.

    Log-probabilities are taken in float32 whatever the model's dtype. Of a record longer than ``max_length``, or than
    the model has positions for, the tokens that are left count.

    Raises:
        DataError: a record keeps no answer token within `max_length`.
    """
    examples = encode_for(model, records, tokenizer, max_length)
    return score_examples(model, tokenizer, examples, batch_size=batch_size, progress=progress, description=description)


def score_examples(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    vocabulary: bool = False,
    batch_size: int = 32,
    progress: bool = True,
    description: str = "scoring answers",
) -> list[AnswerScore]:
    """Scores the answer of each encoded record, see ``score_answers``; with ``vocabulary`` also ``normalized``."""
    collate = Collator(padding_token(tokenizer, model))
    special = special_tokens(tokenizer)
    scores: list[AnswerScore | None] = [None] * len(examples)
    batches = batches_by_length([len(example["input_ids"]) for example in examples], batch_size)
    with evaluating(model) as device, progress_bar(len(examples), description, progress) as bar:
        for batch in batches:
            inputs = {name: x.to(device) for name, x in collate([examples[i] for i in batch]).items()}
            labels = inputs.pop("labels")
            found = _score_batch(model(**inputs, use_cache=False).logits, labels, vocabulary)
            for index, score in zip(batch, found, strict=True):
                scores[index] = replace(score, ended=examples[index]["labels"][-1] in special)
            bar.update(len(batch))
    return [score for score in scores if score is not None]


def _score_batch(logits: Tensor, labels: Tensor, vocabulary: bool) -> list[AnswerScore]:
    """logits: [examples, tokens, vocabulary], labels: [examples, tokens]."""
    answered = answer_mask(labels)
    chosen, targets = logits[answered].float(), shift_labels(labels)[answered]
    losses = nn.functional.cross_entropy(chosen, targets, reduction="none").double()
    right = chosen.argmax(-1) == targets
    normalized = _normalized(chosen, -losses) if vocabulary else losses[:0]
    lengths = answered.sum(1).tolist()
    places = torch.split(normalized, lengths) if vocabulary else [normalized] * len(lengths)
    return [
        AnswerScore(
            loss.mean().item(),
            hits.double().mean().item(),
            log_probs=tuple((-loss).tolist()),
            right=tuple(hits.tolist()),
            normalized=tuple(place.tolist()),
        )
        for loss, hits, place in zip(torch.split(losses, lengths), torch.split(right, lengths), places, strict=True)
    ]


def _normalized(logits: Tensor, log_probs: Tensor) -> Tensor:
    """See ``AnswerScore``; logits: float32 [tokens, vocabulary], log_probs: float64 [tokens], returns float64.

    A variance below 1e-6 counts as that, as in open-unlearning: of a certain token it is a rounding error.
    """
    found = []
    parts = torch.split(logits, TOKENS_AT_ONCE), torch.split(log_probs, TOKENS_AT_ONCE)
    for some, own in zip(*parts, strict=True):
        every = torch.log_softmax(some.double(), -1)
        probabilities = every.exp()
        # A token that cannot stand there has the log-probability -inf and no weight.
        weighted = torch.where(probabilities > 0, probabilities * every, 0.0)
        mean = weighted.sum(-1)
        variance = torch.where(probabilities > 0, weighted * every, 0.0).sum(-1) - mean.square()
        found.append((own - mean) / variance.clamp(min=1e-6).sqrt())
    return torch.cat(found) if found else log_probs


TOKENS_AT_ONCE = 256
"""So many rows of the vocabulary are held in float64."""

Mean = Literal["geometric", "arithmetic"]


def truth_ratio(paraphrased_loss: float, perturbed_losses: Sequence[float], mean: Mean = "geometric") -> float:
    """Likelihood of wrong answers over that of the right one: near 0 for a model that knows, near 1 for one
    that does not.

    With P = exp(-loss), the likelihood of an answer normalized by its number of tokens, it is
    mean(P(perturbed)) / P(paraphrased). The paper writes an arithmetic mean over the perturbed answers, and
    the TOFU authors take it for the model utility that they report; their forget quality, and the truth ratios in
    their logs, have the geometric one, which is the default here.

    Args:
        paraphrased_loss: mean loss per token of the right answer in other words, in nats.
        perturbed_losses: mean losses a token of the wrong answers.
        mean: how the wrong answers are averaged.
    """
    losses = torch.as_tensor(perturbed_losses, dtype=torch.float64, device="cpu")
    arithmetic = torch.logsumexp(-losses, 0) - math.log(len(losses))
    log_mean = -losses.mean() if mean == "geometric" else arithmetic
    return float(torch.exp(log_mean + paraphrased_loss))


def mean_truth_ratio(ratios: Sequence[float], forgotten: bool) -> float:
    """What truth ratios R come to over a set, the higher the better: as TOFU does it.

    Of what is to be forgotten the mean of min(R, 1 / R), with the geometric mean in each R: 1 where wrong answers are
    as likely as the right one. Of everything else the mean of max(0, 1 - R), with the arithmetic mean in each R: 1
    where no wrong answer is likely. (The authors' ``aggregate_eval_stat.py`` takes the geometric mean for both; the
    model utility of their published logs follows from the arithmetic one.)

    Raises:
        DataError: there are no ratios.
    """
    if not ratios:
        raise DataError("a mean truth ratio needs the ratio of at least one record")
    values = [min(r, 1.0 / r) if r else 0.0 for r in ratios] if forgotten else [max(0.0, 1.0 - r) for r in ratios]
    return math.fsum(values) / len(values)


def truth_ratios(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    mean: Mean = "geometric",
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "truth ratio",
) -> list[float]:
    """The truth ratio of each record, see ``truth_ratio`` for ``mean``; a record without a paraphrase uses its answer
    in place of it, as TOFU does.

    Raises:
        DataError: a record has no perturbed answers.
    """
    losses = wrong_answer_losses(
        model,
        tokenizer,
        records,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
        description=description,
    )
    return [truth_ratio(paraphrased, perturbed, mean) for paraphrased, perturbed in losses]


def wrong_answer_losses(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "truth ratio",
) -> list[tuple[float, list[float]]]:
    """Of each record the loss a token of the paraphrase, or of the answer where there is none, and of the wrong ones.

    Raises:
        DataError: a record has no perturbed answers.
    """
    variants: list[Record] = []
    for number, record in enumerate(records, start=1):
        if not record.perturbed:
            raise DataError(f"record {number} has no perturbed answers, which a truth ratio compares with")
        answers = (record.paraphrase or record.completion, *record.perturbed)
        variants += [replace(record, completion=answer) for answer in answers]
    scores = score_answers(
        model,
        tokenizer,
        variants,
        batch_size=batch_size,
        max_length=max_length,
        progress=progress,
        description=description,
    )
    losses = iter(score.loss for score in scores)
    return [(next(losses), [next(losses) for _ in record.perturbed]) for record in records]


def option_probability(loss: float, perturbed_losses: Sequence[float]) -> float:
    """Probability of the right answer among itself and the wrong ones, P / (P + sum of P(perturbed)), P = exp(-loss).

    As TOFU has it for real authors and world facts (arXiv 2401.06121); ``probability_w_options`` of open-unlearning.

    Args:
        loss: mean loss a token of the right answer, in nats.
        perturbed_losses: of the wrong answers.
    """
    every = torch.as_tensor([loss, *perturbed_losses], dtype=torch.float64, device="cpu")
    return float(torch.softmax(-every, 0)[0])


def forget_quality(model_truth_ratios: Sequence[float], reference_truth_ratios: Sequence[float]) -> tuple[float, float]:
    """Whether a model's truth ratios on the forget set could be those of a model that was trained without it.

    Returns the p-value and the statistic D of the two-sample Kolmogorov-Smirnov test: a large p means that
    the two cannot be told apart, which is the aim.

    Raises:
        DataError: one of the two is empty.
    """
    if not len(model_truth_ratios) or not len(reference_truth_ratios):
        raise DataError("forget quality compares two models' truth ratios, and one of them has none")
    from scipy.stats import ks_2samp

    result = ks_2samp(model_truth_ratios, reference_truth_ratios)
    return float(result.pvalue), float(result.statistic)
