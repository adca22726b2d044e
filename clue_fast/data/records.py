"""Question/answer records, read from many sources, and which of them may stand in which set."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from clue_fast.errors import DataError

logger = logging.getLogger(__name__)


def check_text(text: str, where: str) -> None:
    """Raises DataError if a text holds half of a surrogate pair, which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: character {error.start + 1} is half of a surrogate pair ({text[error.start]!a}) and no text; "
            "write the whole character, or leave it out"
        ) from None


COLUMN_SETS = (("question", "answer"), ("prompt", "completion"), ("text",), ("messages",))

OPTIONAL_COLUMNS = {
    "paraphrase": "paraphrased_answer",
    "paraphrased_prompt": "paraphrased_question",
    "corrupted_prompt": "corrupted_prompt",
}
"""What a record may hold besides, by the column that it is read from."""


@dataclass(frozen=True)
class Record:
    """One thing a model can know: what is asked and what should be answered.

    Attributes:
        prompt: the question; empty for plain text.
        completion: the answer, the only part that is learned, forgotten and measured.
        paraphrase: the same answer in other words (TOFU column `paraphrased_answer`).
        perturbed: wrong answers of the same form (TOFU column `perturbed_answer`).
        paraphrased_prompt: the question in other words (TOFU column `paraphrased_question`).
        corrupted_prompt: the question with what the answer hinges on replaced, for circuits.
        history: earlier chat turns, as (role, content).
        verbatim: prompt and completion are joined as they are, without a chat template or "Question:".
        open_ended: more may follow the completion: no end of a turn and no end-of-sequence token is put behind it, so
            that none is learned, forgotten or measured (column of that name, true or false). For a model that completes
            "The capital of France is" and goes on, that end would be most of the loss.
    """

    prompt: str
    completion: str
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    corrupted_prompt: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    verbatim: bool = False
    paraphrased_prompt: str | None = None
    open_ended: bool = False

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
            `messages` that end with the assistant. Optional: `paraphrased_question`, `paraphrased_answer` and
            `corrupted_prompt` (strings), `perturbed_answer` (a string or a list of strings), and `open_ended`
            (true or false).
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
        rows, where = _numbered(read_rows(source, name)), f"the {name} set"
    if isinstance(source, list) and source and all(isinstance(row, Record) for row in source):
        return source
    records = [_record(row, f"{where}, {place}") for place, row in rows]
    if not records:
        raise DataError(f"{where} is empty; it needs at least one record")
    return records


def read_rows(source: Any, name: str, keep_format: bool = False) -> Any:
    """A data set that can be read more than once: what only iterates is read into a list, a path or name stays.

    Args:
        source: as of ``load_records``, or encoded examples.
        name: of the data set, for errors.
        keep_format: leaves the format of a ``datasets.Dataset`` (torch, numpy, pandas ...); otherwise its rows are
            plain Python, and only a transform of the user's own applies.

    Raises:
        DataError: it does not iterate.
    """
    if isinstance(source, (str, PathLike, Mapping, list)):
        return source
    if not isinstance(source, Iterable):
        raise DataError(f"the {name} set is a {type(source).__name__}; pass a list of dicts, a path or a hub name")
    with_format, own = getattr(source, "with_format", None), getattr(source, "format", None)
    transformed = isinstance(own, Mapping) and own.get("type") == "custom"
    if with_format is not None and not transformed and not keep_format:
        source = with_format(None)
    return list(source)


def plain(value: Any) -> Any:
    """A value of numpy or torch as Python has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_disjoint(sets: Mapping[str, Sequence[Record | Example]]) -> None:
    """Raises DataError if two sets share records: none can be both forgotten and kept, or trained on and held out.

    Args:
        sets: records, or examples (the same if their tokens and labels are), by the name of the set.
    """
    keys = {name: [_key(record) for record in records] for name, records in sets.items()}
    for name, other in combinations(keys, 2):
        shared = set(keys[name]) & set(keys[other])
        if not shared:
            continue
        if set(keys[name]) == set(keys[other]):
            raise DataError(
                f"the {name} set equals the {other} set; nothing can be both forgotten and kept, nor held out as well"
            )
        raise DataError(
            f"{sum(key in shared for key in keys[name])} of the {len(keys[name])} {name} records are in the {other} "
            "set too; take them out of one of the two"
        )


def _key(record: Record | Example) -> tuple[object, ...]:
    return record.key if isinstance(record, Record) else (tuple(record["input_ids"]), tuple(record["labels"]))


def _numbered(rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Rows with their place, such as "record 3"."""
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
    return _numbered(rows), f"the {name} set ({source})"


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
    where = f"the {name} set {path}"
    try:
        # A byte-order mark, as Windows writes it, is no part of the text.
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        other = isinstance(error, UnicodeDecodeError)
        raise DataError(f"{where} cannot be read: {error}" + ("; save it as UTF-8" if other else "")) from error
    if "\0" in text:
        raise DataError(f"{where} holds NUL bytes, as UTF-16 has them; save it as UTF-8")
    if text.lstrip().startswith("["):
        yield from _numbered(_parse(text, where))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that was put behind another
        if line.strip():
            yield f"line {number}", _parse(line, where, number)


def _parse(text: str, where: str, line: int | None = None) -> Any:
    """The value of a JSON text, or of a line of JSON lines."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise DataError(f"{where}{place}: the name {twice!r} stands twice in one object; leave one of them out")
        return found

    place = "" if line is None else f", line {line}"
    try:
        return json.loads(text, object_pairs_hook=object_of)
    except json.JSONDecodeError as error:
        place = place or f", line {error.lineno}"
        hint = "" if line is None else "; it should hold one JSON object a line"
        raise DataError(f"{where}{place}: not valid JSON ({error.msg}){hint}") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or brackets thousands deep
        raise DataError(f"{where}{place}: cannot be read as JSON ({error})") from error


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
    optional = {
        name: None if row.get(column) is None else _text(row[column], column, where)
        for name, column in OPTIONAL_COLUMNS.items()
    }
    return Record(
        prompt,
        completion,
        **optional,
        perturbed=_texts(row.get("perturbed_answer"), "perturbed_answer", where),
        history=tuple(history),
        verbatim=columns[0] in ("prompt", "text"),
        open_ended=_flag(row.get("open_ended"), "open_ended", where),
    )


def _text(value: object, column: str, where: str, *, optional: bool = False) -> str:
    value = plain(value)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, expected text")
    if not optional and not value.strip():
        raise DataError(f"{where}: column {column!r} is empty; fill it or leave the record out")
    check_text(value, f"{where}, column {column!r}")
    return value


def _flag(value: object, column: str, where: str) -> bool:
    value = plain(value)
    if not isinstance(value, (bool, type(None))):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, expected true or false")
    return bool(value)


def _texts(value: object, column: str, where: str) -> tuple[str, ...]:
    value = plain(value)
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, expected text or a list of it")
    return tuple(_text(item, column, where) for item in values)


def _turns(messages: object, where: str) -> list[tuple[str, str]]:
    messages = plain(messages)
    if (
        not isinstance(messages, Sequence)
        or isinstance(messages, str)
        or not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages)
    ):
        raise DataError(f"{where}: column 'messages' should be a list of objects with 'role' and 'content'")
    turns = [
        (
            _text(message["role"], "messages.role", where),
            _text(_joined(message["content"], where), "messages.content", where),
        )
        for message in messages
    ]
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        raise DataError(f"{where}: column 'messages' should end with a user's and an assistant's turn")
    return turns


def _joined(content: object, where: str) -> object:
    """The text of a message's content, which may come in parts such as ``{"type": "text", "text": "Who?"}``."""
    parts = plain(content)
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        return parts
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where}: column 'messages.content' holds a part of type {kind!r}, expected parts of text")
        texts.append(_text(part.get("text"), "messages.content.text", where, optional=True))
    return "".join(texts)


def place_of(number: int, name: str | None) -> str:
    """Returns how an error names a record: its number, from 1, and its set."""
    return f"record {number}" if name is None else f"record {number} of the {name} set"


def load_sets(forget: Source, retain: Source, held_out: Source | None = None) -> dict[str, list[Record]]:
    """Reads the data sets of a run. Raises DataError if one cannot be read or two of them share records."""
    sources = {"forget": forget, "retain": retain} | ({} if held_out is None else {"held_out": held_out})
    sets = {name: load_records(source, name) for name, source in sources.items()}
    check_disjoint(sets)
    return sets


def load_further_sets(
    sets: Mapping[str, Sequence[Record]], unseen: Source | None = None, **sources: Source | None
) -> dict[str, list[Record]]:
    """Reads the sets that are only asked, without those that are None.

    Args:
        sets: those of the run, see ``load_sets``.
        unseen: records that no model was trained on.
        sources: others, which may share records with any set.

    Raises:
        DataError: one cannot be read, or what is unseen shares records with what is to be forgotten or kept.
    """
    given = {name: source for name, source in {"unseen": unseen, **sources}.items() if source is not None}
    further = {name: load_records(source, name) for name, source in given.items()}
    if unseen is not None:
        check_disjoint({"forget": sets["forget"], "retain": sets["retain"], "unseen": further["unseen"]})
    return further


def load_retain_sets(forget: Source, retain: Mapping[str, Source]) -> dict[str, list[Record]]:
    """Reads a forget set and several sets to retain, by name, which may share records with one another.

    Raises:
        DataError: one cannot be read, or shares records with the forget set.
    """
    sets = {"forget": load_records(forget, "forget")}
    for name, source in retain.items():
        records = load_records(source, name)
        check_disjoint({"forget": sets["forget"], name: records})
        sets[name] = records
    return sets


def data_hash(records: Sequence[Record]) -> str:
    """A hash of what the records say, whatever their order: it names a data set without telling what is in it."""
    keys = sorted(repr(record.key).encode("utf-8", "surrogatepass") for record in records)
    return hashlib.sha256(b"\0".join(keys)).hexdigest()[:16]
