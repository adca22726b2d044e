"""What a model answers when it is asked: greedy decoding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clue_fast.data import Record, batches_by_length, encode, encode_prompts, padding_token
from clue_fast.errors import DataError
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
    except for further end-of-sequence tokens.

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
    prompts = encode_prompts(records, tokenizer)
    empty = next((number for number, prompt in enumerate(prompts, start=1) if not prompt), None)
    if empty is not None:
        raise DataError(f"record {empty} has no prompt to answer; greedy answers need a question")
    if max_new_tokens is None:
        examples = encode(records, tokenizer)
        pairs = zip(examples, prompts, strict=True)
        max_new_tokens = max((len(example["input_ids"]) - len(prompt) for example, prompt in pairs), default=1)
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
            output = generate(input_ids=input_ids, attention_mask=attention_mask)
            texts = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text.strip()
            bar.update(len(batch))
    return answers


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
    ends = {tokenizer.eos_token_id, *(own_ends if isinstance(own_ends, list) else [own_ends])} - {None}
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
