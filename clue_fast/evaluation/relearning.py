"""How fast a model learns again what it has forgotten: a few steps on some records, then the others are asked."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from clue_fast.data import Collator, Record, answer_mask, encode_for, padding_token
from clue_fast.errors import DataError, SettingError
from clue_fast.evaluation.answers import answered, greedy_answers, progress_bar, rouge_recall

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WIDTH_RATE = 0.2


@dataclass(frozen=True)
class Relearning:
    """What a model answered before and after it learned other records.

    Attributes:
        records: how many it learned, in ``steps`` steps at ``learning_rate``.
        others: how many it was asked.
        answered_before, answered_after: share of those whose greedy answer has ROUGE-L recall >= 0.5.
        recalls_before, recalls_after: ROUGE-L recall of each of them.
        recalls, answers: the same, and the answers themselves, by the number of steps after which they were asked: 0,
            the last, and those between that were wanted.
    """

    records: int
    steps: int
    learning_rate: float
    others: int
    answered_before: float
    answered_after: float
    recalls_before: list[float] = field(repr=False)
    recalls_after: list[float] = field(repr=False)
    recalls: dict[int, list[float]] = field(default_factory=dict, repr=False)
    answers: dict[int, list[str]] = field(default_factory=dict, repr=False)


def relearned_records(records: int, count: int, seed: int) -> set[int]:
    """Which of so many records are learned again, ``count`` of them, drawn by the seed: their indices from 0."""
    return set(random.Random(f"{seed} relearning").sample(range(records), count))


def relearn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    others: Sequence[Record],
    *,
    steps: int = 10,
    every: int | Collection[int] | None = None,
    learning_rate: float | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "relearning",
) -> Relearning:
    """Trains a copy of the model on some forgotten records and asks it the others.

    What comes back with them was hidden, not gone: a model that never saw the others does not learn them from these.
    After Lynch et al. 2024, "Eight Methods to Evaluate Robust Unlearning in LLMs" (arXiv 2402.16835), and Hu et al.
    2024, "Jogging the Memory of Unlearned LLMs Through Targeted Relearning Attacks" (arXiv 2406.13356).

    All weights of the copy train, in float32 and without dropout: AdamW without weight decay, on the mean loss of the
    answer tokens of all records in every step. That takes 16 bytes for every weight. Neither the model itself nor
    torch's generator is touched.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        records: what it learns again.
        others: what it is asked, none of ``records``.
        steps: of AdamW.
        every: asks the others after every so many steps too, or after those that are listed, which changes nothing of
            the steps; None: at the end only.
        learning_rate: default 0.2 / width of the model, .001 at a width of 192 and .00005 at 4096.
        batch_size: records a forward pass; it does not change the steps.
        max_new_tokens: longest answer, see ``greedy_answers``.
        max_length: cuts the records that it learns, in tokens, and answers, see ``greedy_answers``.
        progress, description: of the bar.

    Raises:
        DataError: there are no records, or no others.
        SettingError: the number of steps or the rate is out of range.
    """
    if steps < 1:
        raise SettingError(f"{steps} steps of relearning; at least 1 is needed")
    if isinstance(every, int) and every < 1:
        raise SettingError(f"every {every}: the others are asked after every so many steps, at least 1")
    ask_after = range(every, steps + 1, every) if isinstance(every, int) else every or ()
    width: int = model.get_input_embeddings().weight.shape[-1]  # type: ignore[index, assignment]
    rate = WIDTH_RATE / width if learning_rate is None else learning_rate
    if not 0.0 < rate < math.inf:
        raise SettingError(f"the learning rate of relearning, {rate}, is not a number above 0")
    if not records or not others:
        raise DataError(
            f"{len(records)} records to learn again and {len(others)} to ask; relearning needs at least one of both"
        )

    recalls: dict[int, list[float]] = {}
    given: dict[int, list[str]] = {}

    def ask(asked: PreTrainedModel, step: int) -> None:
        given[step] = greedy_answers(
            asked,
            tokenizer,
            others,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            progress=progress,
        )
        recalls[step] = rouge_recall([record.completion for record in others], given[step])

    ask(model, 0)
    learner: Any = copy.deepcopy(model)  # its methods carry no types
    trained: PreTrainedModel = learner.float().eval().requires_grad_(True)
    examples = encode_for(model, records, tokenizer, max_length)
    collate = Collator(padding_token(tokenizer, model))
    batches = [
        {name: values.to(trained.device) for name, values in collate(examples[start : start + batch_size]).items()}
        for start in range(0, len(examples), batch_size)
    ]
    tokens = [int(answer_mask(batch["labels"]).sum()) for batch in batches]
    shares = [count / sum(tokens) for count in tokens]
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, weight_decay=0.0)
    with torch.enable_grad(), progress_bar(steps, description, progress, unit="step") as bar:
        for step in range(1, steps + 1):
            for batch, share in zip(batches, shares, strict=True):
                torch.autograd.backward(trained(**batch, use_cache=False).loss * share)
            optimizer.step()
            optimizer.zero_grad()
            bar.update()
            if step == steps or step in ask_after:
                ask(trained, step)
    return Relearning(
        records=len(records),
        steps=steps,
        learning_rate=rate,
        others=len(others),
        answered_before=answered(recalls[0]),
        answered_after=answered(recalls[steps]),
        recalls_before=recalls[0],
        recalls_after=recalls[steps],
        recalls=recalls,
        answers=given,
    )
