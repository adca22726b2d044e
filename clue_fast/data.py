"""Question/answer records: read from many sources, turned into tokens and labels, padded into batches."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from clue_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""The label that Hugging Face losses skip."""

COLUMN_SETS = (("question", "answer"), ("prompt", "completion"), ("text",), ("messages",))


@dataclass(frozen=True)
class Record:
    """One thing a model can know: what is asked and what should be answered.

    Attributes:
        prompt: the question; empty for plain text.
        completion: the answer, the only part that is learned, forgotten and measured.
        paraphrase: the same answer in other words (TOFU column `paraphrased_answer`).
        perturbed: wrong answers of the same form (TOFU column `perturbed_answer`).
        corrupted_prompt: the question with what the answer hinges on replaced, for circuits.
        history: earlier chat turns, as (role, content).
        verbatim: prompt and completion are joined as they are, without a chat template or "Question:".
    """

    prompt: str
    completion: str
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    corrupted_prompt: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    verbatim: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two records the same record."""
        return self.history, self.prompt, self.completion


Source: TypeAlias = "str | Path | Iterable[Record | Mapping[str, Any]]"
"""A path to JSON lines, a hub name with its subset, a datasets.Dataset, or a list of dicts or Records."""

Example: TypeAlias = "dict[str, list[int]]"
"""`input_ids` and `labels` of one record, of equal length."""


def load_records(source: Source, name: str) -> list[Record]:
    """Reads a data set.

    Args:
        source: a list of dicts (or of Records), a `datasets.Dataset`, a path to a `.json`/`.jsonl` file with
            one object a line (or one JSON array), or a hub name with its subset, such as
            "locuslab/TOFU:forget10" (its split "train"; append ":validation" for another). Only a hub name
            can cause a download. Columns: `question`/`answer`, `prompt`/`completion`, `text`, or chat
            `messages` that end with the assistant. Optional: `paraphrased_answer` (a string) and
            `perturbed_answer` (a string or a list of strings), and `corrupted_prompt` (a string).
        name: what to call the data set in errors, such as "forget".

    Raises:
        DataError: the set is empty or unreadable, or a row lacks a column or holds anything but text.
    """
    if isinstance(source, (str, Path)):
        rows, where = _open(source, name)
    elif isinstance(source, Mapping):
        raise DataError(
            f"the {name} set is a mapping with the keys {sorted(map(str, source))}; "
            "pass one split of it, or a list of dicts"
        )
    else:
        rows, where = _numbered(source, name), f"the {name} set"
    records = [_record(row, f"{where}, {place}") for place, row in rows]
    if not records:
        raise DataError(f"{where} is empty; it needs at least one record")
    return records


def check_disjoint(forget: Sequence[Record], retain: Sequence[Record]) -> None:
    """Raises DataError if a record is to be both forgotten and kept."""
    forget_keys, retain_keys = ({record.key for record in records} for records in (forget, retain))
    shared = len(forget_keys & retain_keys)
    if not shared:
        return
    if forget_keys == retain_keys:
        raise DataError("the forget set equals the retain set; nothing can be both forgotten and kept")
    raise DataError(
        f"{shared} of the {len(forget_keys)} forget records are in the retain set too; take them out of one of the two"
    )


def encode(
    records: Sequence[Record], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[Example]:
    r"""Tokenizes records for training and teacher-forced evaluation.

    Prompt and completion are tokenized separately and concatenated, so that a prompt has the same tokens
    with and without its answer. Prompt tokens get the label -100; the labels are the completion and the
    end-of-sequence token.

    Args:
        records: what to encode.
        tokenizer: its chat template is used if it has one; otherwise "Question: ...\nAnswer: ...".
        max_length: longest example, in tokens; what lies beyond is cut off. None: nothing is cut.

    Raises:
        DataError: a record keeps no label within `max_length`, or the tokenizer has no end-of-sequence token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    if not records:
        return []
    rendered = [_render(record, tokenizer) for record in records]
    prompts = _prompt_tokens([prompt for prompt, _ in rendered], records, tokenizer)
    completions = _tokens([completion for _, completion in rendered], tokenizer)
    examples, cut = [], 0
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
        if not completion or completion[-1] != end:
            completion = [*completion, end]
        input_ids = prompt + completion
        labels = [IGNORED_LABEL] * len(prompt) + completion
        if max_length is not None and len(input_ids) > max_length:
            cut += 1
            input_ids, labels = input_ids[:max_length], labels[:max_length]
        if all(label == IGNORED_LABEL for label in labels[1:]):
            raise DataError(
                f"record {number} keeps no answer token: its prompt has {len(prompt)} tokens and max_length "
                f"is {max_length}; raise max_length or shorten the prompt"
            )
        examples.append({"input_ids": input_ids, "labels": labels})
    if cut:
        logger.warning("%d of %d records were cut to %d tokens", cut, len(records), max_length)
    return examples


def encode_prompts(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each record's prompt, as they stand in front of its answer in `encode`."""
    return _prompt_tokens([_render(record, tokenizer)[0] for record in records], records, tokenizer)


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right into one batch.

    Called with a list of examples, it returns `input_ids`, `attention_mask` and `labels`, int64 [examples,
    longest].
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, Tensor]:
        """Pads and stacks the examples."""
        shape = (len(examples), max(len(example["input_ids"]) for example in examples))
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED_LABEL, dtype=torch.long),
        }
        for row, example in enumerate(examples):
            length = len(example["input_ids"])
            batch["input_ids"][row, :length] = torch.as_tensor(example["input_ids"])
            batch["attention_mask"][row, :length] = 1
            batch["labels"][row, :length] = torch.as_tensor(example["labels"])
        return batch


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token id to pad with: the tokenizer's own, or else its end-of-sequence token."""
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise DataError("the tokenizer has neither a padding nor an end-of-sequence token; set tokenizer.pad_token")
    return int(token)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: little is padded, and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _numbered(rows: object, name: str) -> Iterator[tuple[str, Any]]:
    """Rows with their place, such as "record 3"."""
    if not isinstance(rows, Iterable):
        raise DataError(f"the {name} set is a {type(rows).__name__}; pass a list of dicts, a path or a hub name")
    return ((f"record {number}", row) for number, row in enumerate(rows, start=1))


def _open(source: str | Path, name: str) -> tuple[Iterator[tuple[str, Any]], str]:
    """Rows of a file or hub set with their places, and what to call it."""
    path = Path(source)
    if path.is_file():
        return _read_json(path, name), f"the {name} set ({path})"
    if path.is_dir():
        raise DataError(f"the {name} set {path} is a folder; pass a JSON lines file inside it")
    if isinstance(source, Path) or path.suffix in (".json", ".jsonl"):
        raise DataError(f"the {name} set {path} does not exist; check the path")
    repository, *rest = str(source).split(":")
    if repository.count("/") != 1 or len(rest) > 2 or not all(repository.split("/")):
        raise DataError(
            f"the {name} set {str(source)!r} is neither a file nor a hub name; "
            'write a path to JSON lines, or "owner/name:subset"'
        )
    rows = _download(repository, *rest, name=name)
    return _numbered(rows, name), f"the {name} set ({source})"


def _download(repository: str, subset: str | None = None, split: str = "train", *, name: str) -> Iterable[Any]:
    title = repository if subset is None else f"{repository}:{subset}"
    try:
        import datasets
    except ImportError:
        raise DataError(f"the {name} set {title} is on the hub; install the package 'datasets' to read it") from None
    try:
        rows: Iterable[Any] = datasets.load_dataset(repository, subset, split=split)
    except Exception as error:  # the hub client raises a dozen unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"the {name} set {title} (split {split}) cannot be loaded from the hub: {reason}; "
            "check its name and the network, or pass a local file"
        ) from error
    return rows


def _read_json(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the {name} set {path} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        try:
            yield from _numbered(json.loads(text), name)
        except json.JSONDecodeError as error:
            raise DataError(f"the {name} set {path}, line {error.lineno}: not valid JSON ({error.msg})") from error
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"the {name} set {path}, line {number}: not valid JSON ({error.msg}); "
                "it should hold one JSON object a line"
            ) from error


def _record(row: object, where: str) -> Record:
    if isinstance(row, Record):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: found {type(row).__name__}, expected an object with named columns")
    columns = next((names for names in COLUMN_SETS if all(name in row for name in names)), None)
    if columns is None:
        found = ", ".join(map(repr, row)) or "none"
        wanted = ", ".join(" and ".join(names) for names in COLUMN_SETS)
        raise DataError(f"{where}: found the columns {found}; expected one of: {wanted}")
    history: list[tuple[str, str]] = []
    prompt = ""
    if columns == ("messages",):
        *history, (_, prompt), (_, completion) = _turns(row["messages"], where)
    else:
        completion = _text(row[columns[-1]], columns[-1], where)
        if len(columns) == 2:
            prompt = _text(row[columns[0]], columns[0], where, optional=columns[0] == "prompt")
    paraphrase, corrupted = row.get("paraphrased_answer"), row.get("corrupted_prompt")
    return Record(
        prompt,
        completion,
        paraphrase=None if paraphrase is None else _text(paraphrase, "paraphrased_answer", where),
        perturbed=_texts(row.get("perturbed_answer"), "perturbed_answer", where),
        corrupted_prompt=None if corrupted is None else _text(corrupted, "corrupted_prompt", where),
        history=tuple(history),
        verbatim=columns[0] in ("prompt", "text"),
    )


def _text(value: object, column: str, where: str, *, optional: bool = False) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    if not optional and not value.strip():
        raise DataError(f"{where}: column {column!r} is empty; fill it or leave the record out")
    return value


def _texts(value: object, column: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, expected text or a list of it")
    return tuple(_text(item, column, where) for item in values)


def _turns(messages: object, where: str) -> list[tuple[str, str]]:
    if (
        not isinstance(messages, Sequence)
        or isinstance(messages, str)
        or not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages)
    ):
        raise DataError(f"{where}: column 'messages' should be a list of objects with 'role' and 'content'")
    turns = [
        tuple(_text(message[key], f"messages.{key}", where) for key in ("role", "content")) for message in messages
    ]
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise DataError(f"{where}: column 'messages' should end with a user's and an assistant's turn")
    return [(role, content) for role, content in turns]


def _render(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The text of the prompt and that of the completion, which follows without a gap."""
    if record.verbatim:
        return record.prompt, record.completion
    if tokenizer.chat_template:
        return _render_chat(record, tokenizer)
    if record.history:
        raise DataError(
            f"the record {record.prompt[:40]!r} is a chat of several turns, and the tokenizer has no "
            "template; set tokenizer.chat_template, or pass question and answer"
        )
    return f"Question: {record.prompt}\nAnswer:", f" {record.completion}"


def _render_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    turns = [{"role": role, "content": content} for role, content in (*record.history, ("user", record.prompt))]
    prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    turns.append({"role": "assistant", "content": record.completion})
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    # The template may close the turn with more than the end-of-sequence token, such as <end_of_turn>.
    completion = whole[len(prompt) :].rstrip() if whole.startswith(prompt) else record.completion
    return prompt, completion


def _prompt_tokens(
    prompts: Sequence[str], records: Sequence[Record], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    start = tokenizer.bos_token_id
    adds_start = start is not None and start in tokenizer("")["input_ids"]
    tokens = _tokens(prompts, tokenizer)
    if not adds_start:
        return tokens
    # A chat template writes the start token itself.
    return [
        [start, *prompt] if record.verbatim or not tokenizer.chat_template else prompt
        for prompt, record in zip(tokens, records, strict=True)
    ]


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return encoded
