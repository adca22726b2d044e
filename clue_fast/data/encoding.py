"""The whole text of a record as a model reads it, its tokens, and where its answer begins among them.

A tokenizer cuts "Answer: Paris" into other tokens than "Answer:" and " Paris", so that prompt and answer are one text:

- The answer begins where the prompt ends: behind the chat template's generation prompt, or behind "Answer:". Blanks
  between that and the answer are the answer's, since the model writes them; anything else that the template puts there,
  such as an empty <think> block, is the prompt's.
- The answer ends with the end of its turn, as the chat template writes it: the first special token behind the answer
  (<|im_end|>, <end_of_turn>, <|eot_id|>, </s>), or all that is not blank where it writes none. What follows is left
  out. Where the template writes nothing, and without a template, it is what the tokenizer itself puts behind a text, or
  else its end-of-sequence token. A record that is open-ended has none of these.
- A token belongs to the answer if it holds a character of the answer; so does one that holds the end of the prompt too.
- A chat template writes the start token itself (or none, and then there is none, as in ``apply_chat_template``);
  elsewhere the tokenizer adds it, unless the text begins with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clue_fast.data.collator import IGNORED_LABEL, answer_mask, check_examples, longest
from clue_fast.data.records import Example, Record, check_text, place_of
from clue_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PRIVATE_USE = range(0xE000, 0xF900)
"""Characters without a meaning, one of which stands for an answer."""


@dataclass(frozen=True)
class WholeText:
    """Prompt and answer as one text.

    Attributes:
        text: up to the end of the answer.
        start: where the answer begins, in characters.
        ended: the text holds the end of the answer's turn.
        open_ended: no end belongs behind it.
        adds_special_tokens: the tokenizer puts its special tokens around it; a chat template has written them.
    """

    text: str
    start: int
    ended: bool = False
    open_ended: bool = False
    adds_special_tokens: bool = True


def render(record: Record, tokenizer: PreTrainedTokenizerBase, where: str) -> WholeText:
    """The whole text of a record.

    Args:
        record: what to render.
        tokenizer: its chat template is used, if it has one and the record is not verbatim.
        where: what to call the record in errors.

    Raises:
        DataError: the chat template refuses the conversation, or the answer cannot be found in what it writes, or the
            record is no text.
    """
    if record.verbatim:
        whole = WholeText(record.prompt + record.completion, len(record.prompt), open_ended=record.open_ended)
    elif tokenizer.chat_template:
        whole = _render_chat(record, tokenizer, where)
    elif record.history:
        raise DataError(
            f"{where} is a chat of several turns, and the tokenizer has no template; set tokenizer.chat_template, or "
            "pass question and answer"
        )
    else:
        prompt = f"Question: {record.prompt}\nAnswer:"
        whole = WholeText(f"{prompt} {record.completion}", len(prompt), open_ended=record.open_ended)
    check_text(whole.text, where)
    return whole


def tokenize(
    texts: Sequence[WholeText], tokenizer: PreTrainedTokenizerBase, places: Sequence[str]
) -> list[tuple[list[int], int]]:
    """The tokens of each text, the end of its answer included, and the index of the answer's first.

    Which characters a token holds is what a fast tokenizer says; without that, the prompt's tokens are those that the
    whole text has in common with the prompt alone.

    Args:
        texts: what to tokenize.
        tokenizer: of the model.
        places: what to call each text in errors.

    Raises:
        DataError: an answer has no token, or no end is known.
    """
    found: list[tuple[list[int], int]] = [([], 0)] * len(texts)
    for special in (True, False):
        numbers = [number for number, one in enumerate(texts) if one.adds_special_tokens == special]
        for number, (ids, spans) in zip(numbers, _encoded([texts[n] for n in numbers], tokenizer), strict=True):
            one = texts[number]
            first = _common_prefix(ids, one, tokenizer) if spans is None else _first_token(ids, spans, one, tokenizer)
            if first >= len(ids):
                raise DataError(f"{places[number]}: its answer is no token of this tokenizer; leave the record out")
            found[number] = (_closed(ids, one, tokenizer), first)
    return found


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that stand for no text, such as those that end a turn, by their ids."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = ((number, str(token)) for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    return {number: token for number, token in (*named, *added) if number != tokenizer.unk_token_id}


def _render_chat(record: Record, tokenizer: PreTrainedTokenizerBase, where: str) -> WholeText:
    turns = [{"role": role, "content": content} for role, content in (*record.history, ("user", record.prompt))]

    def written(answer: str | None) -> str:
        """The conversation with that answer, or up to where the model is to write one."""
        more = [] if answer is None else [{"role": "assistant", "content": answer}]
        try:
            return str(
                tokenizer.apply_chat_template([*turns, *more], tokenize=False, add_generation_prompt=answer is None)
            )
        except Exception as error:  # a template is a program of its author, and refuses with whatever it raises
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise DataError(
                f"{where}: the tokenizer's chat template refuses the conversation ({reason}); change its roles or "
                "turns, or set another tokenizer.chat_template"
            ) from error

    whole, prompt = written(record.completion), written(None)
    # Where the template puts an answer is seen by giving it one that occurs nowhere else.
    mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in whole)
    before, _, after = written(mark).partition(mark)
    placed = mark not in after and len(before) + len(after) < len(whole)
    placed = placed and whole.startswith(before) and whole.endswith(after)
    if placed and not (before.startswith(prompt) and before[len(prompt) :].strip() == ""):
        start, end = len(before), len(whole) - len(after)
    elif whole.startswith(prompt) and whole[len(prompt) :].strip():
        start = len(prompt)
        end = len(whole) - len(after) if placed else start
    else:
        raise DataError(
            f"{where}: the answer cannot be found in what the tokenizer's chat template writes; the template changes "
            "the conversation with its answer. Set another tokenizer.chat_template, or pass prompt and completion"
        )
    closing = "" if record.open_ended else _end_of_turn(whole[end:], tokenizer)
    return WholeText(
        whole[:end] + closing,
        start,
        ended=bool(closing),
        open_ended=record.open_ended,
        adds_special_tokens=False,
    )


def _end_of_turn(behind: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The part of what the template writes behind an answer that ends its turn."""
    ends = (behind.find(token) + len(token) for token in special_tokens(tokenizer).values() if token in behind)
    return behind[: min(ends, default=len(behind.rstrip()))]


Spans = Sequence[tuple[int, int]]
"""The characters of each token, from and up to."""


def _encoded(texts: Sequence[WholeText], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], Spans | None]]:
    """Tokens of texts that all do or do not get special tokens, and the span of each if the tokenizer tells it."""
    if not texts:
        return []
    options: dict[str, Any] = {"add_special_tokens": texts[0].adds_special_tokens}
    if getattr(tokenizer, "is_fast", False):
        options["return_offsets_mapping"] = True
    encoded = tokenizer([one.text for one in texts], **options)
    spans: Sequence[Spans | None] = encoded["offset_mapping"] if len(options) > 1 else [None] * len(texts)
    starts = tokenizer.bos_token_id
    found = []
    for ids, own in zip(encoded["input_ids"], spans, strict=True):
        # The text may begin with the start token that the tokenizer puts in front.
        doubled = texts[0].adds_special_tokens and starts is not None and ids[:2] == [starts, starts]
        found.append((ids[1:], None if own is None else own[1:]) if doubled else (ids, own))
    return found


def _first_token(ids: Sequence[int], spans: Spans, one: WholeText, tokenizer: PreTrainedTokenizerBase) -> int:
    """Index of the first token that holds a character of the answer, or how many tokens there are."""
    for index, (begin, end) in enumerate(spans):
        if end > one.start:
            return index
        if begin == end == one.start:
            # A token without characters on the border: put in front of the answer, or in front of the text.
            if index >= _common_prefix(ids, one, tokenizer):
                return index
        elif begin < end and one.text[end : one.start + 1].isspace() and not one.text[end - 1].isspace():
            # The span of a byte-level token may lack the blanks at its end.
            text = str(tokenizer.decode([ids[index]], clean_up_tokenization_spaces=False))
            if end + len(text) - len(text.rstrip()) > one.start:
                return index
    return len(ids)


def _common_prefix(ids: Sequence[int], one: WholeText, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens the whole text begins with that the prompt alone begins with too."""
    prompt = WholeText(one.text[: one.start], one.start, adds_special_tokens=one.adds_special_tokens)
    ((own, _),) = _encoded([prompt], tokenizer)
    return next(
        (i for i, pair in enumerate(zip(ids, own, strict=False)) if pair[0] != pair[1]), min(len(ids), len(own))
    )


def _closed(ids: list[int], one: WholeText, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text with an end behind them, or, if it is open-ended, without."""
    end = tokenizer.eos_token_id
    has_end = ids[-1] in (end, getattr(tokenizer, "sep_token_id", None))
    if one.open_ended:
        return ids[:-1] if has_end and one.adds_special_tokens else ids
    if one.ended or has_end:
        return ids
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    return [*ids, end]


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    name: str | None = None,
) -> list[Example]:
    r"""Tokenizes records for training and teacher-forced evaluation.

    Prompt and answer are tokenized as one text, see the head of this module. The labels are the tokens of the answer
    and of the end of its turn, unless it is open-ended; those of the prompt have the label -100.

    Args:
        records: what to encode.
        tokenizer: its chat template is used if it has one; otherwise "Question: ...\nAnswer: ...".
        max_length: longest example, in tokens; what lies beyond is cut off. None: nothing is cut.
        name: of the data set, for errors and warnings.

    Raises:
        DataError: a record keeps no label within ``max_length``, its answer cannot be found in what the chat template
            writes, the template refuses its conversation, or the tokenizer has no end-of-sequence token.
    """
    examples = encode_whole(records, tokenizer, name)
    kept = cut_examples(examples, max_length, name)
    number = sum(len(one["input_ids"]) < len(whole["input_ids"]) for one, whole in zip(kept, examples, strict=True))
    if number:
        of = "" if name is None else f" of the {name} set"
        logger.warning("%d of %d records%s were cut to %d tokens", number, len(records), of, max_length)
    return kept


def encode_for(
    model: nn.Module,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    name: str | None = None,
) -> list[Example]:
    """``encode`` within what a model can take: no longer than it has positions for.

    Raises:
        DataError: see ``encode``; or the model has no embedding for a token.
    """
    examples = encode(records, tokenizer, longest(model, max_length), name)
    check_examples(examples, model, name)
    return examples


def check_encoding(
    model: nn.Module,
    sets: Mapping[str, Sequence[Record]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
) -> None:
    """Raises the DataError of ``encode_for`` if a record of one of the sets cannot be encoded."""
    for name, records in sets.items():
        examples = cut_examples(encode_whole(records, tokenizer, name), longest(model, max_length), name)
        check_examples(examples, model, name)


def encode_prompts(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, name: str | None = None
) -> list[list[int]]:
    """The tokens of each record's prompt, as they stand in front of its answer in ``encode``."""
    return [prompt_tokens(example) for example in encode(records, tokenizer, name=name)]


def prompt_tokens(example: Mapping[str, list[int]]) -> list[int]:
    """The tokens of a record, as ``encode`` has it, that stand in front of its answer: what a model answers to."""
    return example["input_ids"][: example["labels"].count(IGNORED_LABEL)]


class EncodedRecords(list[Record]):
    """Records with their tokens, so that what they are handed on to need not make them again.

    Args:
        records: of one data set.
        tokenizer: of the model; it must not change as long as these are in use.
        name: of the data set, for errors.

    Attributes:
        examples: whole, see ``encode``. Each may get a list ``counted``, 1 or 0 for each of its tokens: where units are
            measured then, instead of where the answer is predicted. Nothing else reads it.

    Raises:
        DataError: see ``encode``.
    """

    def __init__(self, records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> None:
        super().__init__(records)
        self.tokenizer = tokenizer
        self.examples: list[Example] = encode_whole(records, tokenizer, name)


def encode_whole(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, name: str | None = None
) -> list[Example]:
    """The examples of ``encode``, none of them cut; those that the records bring along, where they do."""
    if isinstance(records, EncodedRecords) and records.tokenizer is tokenizer:
        return records.examples
    places = [place_of(number, name) for number in range(1, len(records) + 1)]
    texts = [render(record, tokenizer, place) for record, place in zip(records, places, strict=True)]
    return [
        {"input_ids": tokens, "labels": [IGNORED_LABEL] * first + tokens[first:]}
        for tokens, first in tokenize(texts, tokenizer, places)
    ]


def cut_examples(examples: Sequence[Example], max_length: int | None, name: str | None = None) -> list[Example]:
    """Whole examples without what lies beyond so many tokens.

    Raises:
        DataError: one keeps no label.
    """
    kept: list[Example] = []
    for number, whole in enumerate(examples, start=1):
        example = {key: values[:max_length] for key, values in whole.items()}
        if not answer_mask(torch.tensor(example["labels"], device="cpu")).any():
            raise DataError(
                f"{place_of(number, name)} keeps no answer token: its prompt has {len(prompt_tokens(whole))} tokens "
                f"and max_length is {max_length}; raise max_length as far as the model has positions, or shorten the "
                "prompt"
            )
        kept.append(example)
    return kept
