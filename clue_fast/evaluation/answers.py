"""What a model answers when it is asked: its likeliest answer, or samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clue_fast.data import Record, batches_by_length, encode, encode_prompts, end_tokens, padding_token
from clue_fast.errors import DataError, SettingError
from clue_fast.evaluation.state import evaluating, progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: bool = True,
    description: str = "answering",
) -> list[str]:
    """The model's greedy answer to each record's prompt, in the order of the records.

    The model's own generation settings (sampling, penalties, forced tokens, a static cache) do not apply,
    except for further end-of-sequence tokens; an answer also ends where a turn does in the chat template.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        records: what to ask.
        batch_size: prompts a batch, padded on the left.
        max_new_tokens: longest answer; None: as many as the longest of the records' own answers has.
        progress: shows a bar if it takes longer than a second.
        description: the bar's title.

    Raises:
        DataError: a prompt has no token to start from.
    """
    prompts = _prompts(records, tokenizer)
    longest = _longest(records, prompts, tokenizer) if max_new_tokens is None else max_new_tokens
    return _answers(model, tokenizer, prompts, batch_size, longest, progress, description)


def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    k: int = 20,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    progress: bool = True,
    description: str = "sampling answers",
) -> list[list[str]]:
    """Answers sampled from the model, k to each record's prompt, in the order of the records.

    They show what greedy decoding hides. Every token is drawn from the whole distribution (no top-k, no top-p) by
    inversion: the first whose cumulative probability exceeds a number that was drawn from the seed before. So an
    answer depends on the seed, and neither on the batch that it is generated in (beyond rounding) nor on torch's
    generator; and the same seed confronts two models with the same draws.

    Args:
        model, tokenizer, records, max_new_tokens, progress, description: as of ``greedy_answers``.
        k: answers a record.
        temperature: logits are divided by it; 1 is the model's own distribution.
        seed: of the draws.
        batch_size: answers a batch.

    Raises:
        DataError: a prompt has no token to start from.
        SettingError: k or the temperature is not above 0.
    """
    if k < 1:
        raise SettingError(f"{k} samples were asked for; at least 1 can be drawn")
    if not 0.0 < temperature < math.inf:
        raise SettingError(
            f"temperature {temperature} is not a number above 0; greedy_answers takes the likeliest token"
        )
    prompts = _prompts(records, tokenizer)
    longest = _longest(records, prompts, tokenizer) if max_new_tokens is None else max_new_tokens
    draws = torch.rand(len(prompts) * k, longest, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    repeated = [prompt for prompt in prompts for _ in range(k)]
    answers = _answers(
        model,
        tokenizer,
        repeated,
        batch_size,
        longest,
        progress,
        description,
        lambda rows: _Draw(draws[rows], temperature),
    )
    return [answers[start : start + k] for start in range(0, len(answers), k)]


def _prompts(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    prompts = encode_prompts(records, tokenizer) if records else []
    empty = next((number for number, prompt in enumerate(prompts, start=1) if not prompt), None)
    if empty is not None:
        raise DataError(f"record {empty} has no prompt; an answer needs a question")
    return prompts


def _longest(records: Sequence[Record], prompts: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest of the records' own answers, its end included."""
    pairs = zip(encode(records, tokenizer), prompts, strict=True)
    return max((len(example["input_ids"]) - len(prompt) for example, prompt in pairs), default=1)


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    batch_size: int,
    max_new_tokens: int,
    progress: bool,
    description: str,
    choice: Callable[[list[int]], _Draw] | None = None,
) -> list[str]:
    """Text that the model adds to each prompt; ``choice`` of the prompts' indices says how a token is chosen."""
    answers = [""] * len(prompts)
    padding = padding_token(tokenizer)
    generate: Any = model.generate  # its decorator hides its type
    with (
        evaluating(model) as device,
        _greedy(model, tokenizer, max_new_tokens),
        progress_bar(len(prompts), description, progress) as bar,
    ):
        for batch in batches_by_length([len(prompt) for prompt in prompts], batch_size):
            input_ids, attention_mask = _pad_left([prompts[index] for index in batch], padding, device)
            processors = [] if choice is None else [choice(batch)]
            output = generate(input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors)
            texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text.strip()
            bar.update(len(batch))
    return answers


class _Draw:
    """A logits processor that draws the next token and leaves greedy decoding no other.

    Args:
        draws: [answers, tokens] in [0, 1), the number each token of each answer is drawn by.
        temperature: the logits are divided by it.
    """

    def __init__(self, draws: Tensor, temperature: float) -> None:
        self.steps = iter(draws.unbind(1))
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: logits [answers, vocabulary]; returns 0 for the token drawn and -inf for the rest."""
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        draw = next(self.steps).to(scores.device)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


def _pad_left(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [prompts, longest]; every prompt ends in the last column."""
    shape = (len(prompts), max(map(len, prompts)))
    input_ids = torch.full(shape, padding, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        input_ids[row, -len(prompt) :] = torch.as_tensor(prompt)
        attention_mask[row, -len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[None]:
    """Replaces the model's generation settings: `generate` would fill whatever is left open from them."""
    from transformers import GenerationConfig

    own: Any = model.generation_config
    own_ends = own.eos_token_id if own is not None else None
    ends = end_tokens(tokenizer) | {*(own_ends if isinstance(own_ends, list) else [own_ends])} - {None}
    settings: Any = GenerationConfig  # its constructor carries no types
    model.generation_config = settings(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=padding_token(tokenizer),
        eos_token_id=sorted(ends),
    )
    try:
        yield
    finally:
        model.generation_config = own
