"""What a model still knows: how likely it finds the answer to each fact, and whether it is its first choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from bench.files import DATA
from clue_fast.data import Record
from clue_fast.evaluation import perplexity, score_answers

TOKENS, WINDOW = 512, 128


def answers(model: nn.Module, tokenizer: Any, records: Sequence[Record]) -> list[tuple[float, bool]]:
    """Returns, for every record, the probability of its answer and whether greedy decoding says it.

    The answer is what of the completion comes before a final full stop; the end of the text is no part of it. Greedy
    decoding says it if each of its tokens is the first choice behind those before it.
    """
    asked = [replace(record, completion=record.completion.rstrip("."), open_ended=True) for record in records]
    scores = score_answers(model, tokenizer, asked, progress=False)
    return [(math.exp(math.fsum(score.log_probs)), all(score.right)) for score in scores]


def text_loss(model: nn.Module, tokenizer: Any) -> float:
    """Returns the mean loss per token on the beginning of the test text of WikiText-2, in nats."""
    text = (DATA / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:20_000]
    return math.log(perplexity(model, tokenizer, text, window=WINDOW, tokens=TOKENS, progress=False))


def measure(model: nn.Module, tokenizer: Any, sets: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Returns the probabilities and greedy hits of every set, and the loss on general text."""
    names = [name for name, records in sets.items() for _ in records]
    found: dict[str, Any] = {name: {"probability": [], "answered": []} for name in sets}
    everything = [record for records in sets.values() for record in records]
    for name, (probability, answered) in zip(names, answers(model, tokenizer, everything), strict=True):
        found[name]["probability"].append(float(f"{probability:.5g}"))
        found[name]["answered"].append(int(answered))
    return {**found, "text_loss": text_loss(model, tokenizer)}
