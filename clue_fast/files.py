"""Reading and writing the package's own files: safetensors with a header that says what they are.

Files are written beside their destination and then renamed, so that an interrupted run leaves the old file or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clue_fast.errors import FileFormatError, OutputError

FORMAT_VERSION = 1


def save_tensors(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes tensors and a JSON header atomically.

    Args:
        path: destination; replaced if it exists.
        kind: what the file holds, checked when it is loaded, such as "selection".
        tensors: any dtypes and shapes; moved to the CPU.
        header: whatever JSON can hold.

    Raises:
        OutputError: the folder does not exist or cannot be written.
    """
    metadata = {"clue_fast": kind, "version": str(FORMAT_VERSION), "header": json.dumps(header)}
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        safetensors.torch.save_file(content, temporary, metadata=metadata)


def save_json(path: str | os.PathLike[str], content: object) -> None:
    """Writes indented JSON atomically. Raises OutputError if the folder does not exist or cannot be written."""
    save_text(path, json.dumps(content, indent=2) + "\n")


def save_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text as UTF-8 atomically. Raises OutputError if the folder does not exist or cannot be written."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text in UTF-8. Raises FileFormatError if there is none, or it is in another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FileFormatError(f"the text {path} cannot be read: {error}") from error


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty file beside ``path`` that takes its place when the block ends well, and is gone if not."""
    path = check_output_file(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except (safetensors.SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what ``save_tensors`` wrote.

    Returns:
        The tensors, on the CPU, and the header.

    Raises:
        FileFormatError: the file is missing, truncated, no safetensors file, or of another kind or version.
    """
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: no such file") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise FileFormatError(f"{path} is truncated or not a {kind} file ({error}); make it again") from error
    if metadata.get("clue_fast") != kind:
        found = metadata.get("clue_fast", "a safetensors file of another program")
        raise FileFormatError(f"{path} holds {found}, not a {kind}")
    if metadata.get("version") != str(FORMAT_VERSION):
        raise FileFormatError(
            f"{path} has format version {metadata.get('version')}, this package reads {FORMAT_VERSION}; make it again"
        )
    try:
        header = json.loads(metadata["header"])
    except (KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} has a damaged header; make it again") from error
    return tensors, header


def tensors_hash(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> str:
    """Returns a hash of the names, shapes, dtypes and bits of tensors, or of some of them, whatever their order."""
    found = hashlib.sha256()
    for name in sorted(tensors if names is None else names):
        tensor = tensors[name]
        found.update(f"{name} {list(tensor.shape)} {tensor.dtype}\0".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def check_output_file(path: str | os.PathLike[str]) -> Path:
    """Returns the path of a file that may be written or replaced.

    Raises:
        OutputError: it is a folder, or its folder does not exist or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a folder; name a file")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OutputError(f"cannot write {path}: choose a folder that exists and is writable")
    return path


def check_output(path: str | os.PathLike[str]) -> Path:
    """Returns the path of an output folder that may be made. Nothing is made yet.

    Raises:
        OutputError: it is a file, or a folder that is not empty, or cannot be made.
    """
    path = Path(path)
    if path.is_file():
        raise OutputError(f"{path} is a file; name a folder for the output")
    if path.is_dir() and any(path.iterdir()):
        raise OutputError(f"the output folder {path} is not empty; name a new one or empty it")
    parent = existing_parent(path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be made: {parent} is no folder that can be written; choose another")
    return path


def existing_parent(path: Path) -> Path:
    """Returns the nearest folder above a path that exists."""
    return next(folder for folder in (path.parent, *path.parent.parents) if folder.exists())


@contextmanager
def output_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside ``path`` that takes its name when the block ends well, and is gone if not."""
    path = check_output(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
