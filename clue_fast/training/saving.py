"""Saving that does not fail at the end: tried before training, and trained weights kept somewhere if it fails after."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from clue_fast.errors import ClueFastError, ModelError, OutputError
from clue_fast.files import check_output, existing_parent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SPARE = 1.05
"""Free space that is asked for, over the bytes of the weights: configuration, tokenizer, selection and plots."""


def detach_quantizer(model: nn.Module) -> bool:
    """Detaches a quantizer that has nothing left to do, since every weight is a plain number.

    Loading from GGUF leaves one attached; transformers then neither trains nor saves the model.

    Returns:
        Whether there was one.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None or not all(_is_plain(tensor) for tensor in model.state_dict().values()):
        return False
    quantizer.remove_quantization_config(model)
    logger.info("a quantizer was attached to a model whose weights are plain numbers; it was detached")
    return True


def check_saving(
    model: PreTrainedModel, output_dir: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Tries out everything that saving a checkpoint does, on one number of each weight.

    Raises:
        ModelError: the model or the tokenizer cannot be saved, such as for generation settings that contradict each
            other, weights that share memory without being declared as tied, or quantized weights.
        OutputError: the disk has less room than the weights take.
    """
    from transformers.utils import logging as transformers_logging

    output = check_output(output_dir)
    parent = existing_parent(output)
    needed, free = weight_bytes(model), shutil.disk_usage(parent).free
    if free < needed * SPARE:
        raise OutputError(
            f"the checkpoint takes {needed / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free; "
            "make room, or choose another output folder"
        )
    # One number each, in the memory of its weight: what is shared stays shared.
    corner = {name: _corner(tensor) for name, tensor in model.state_dict().items()}
    progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{output.name}.") as folder:
            model.save_pretrained(folder, state_dict=corner, save_original_format=False)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
    except Exception as error:  # whatever transformers raises would be raised after training too
        raise ModelError(
            f"the model could not be saved after training: {_reason(error)} Mend that first; nothing was trained"
        ) from error
    finally:
        if progress:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def keeping_trained_weights(model: nn.Module, output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever fails inside, the weights of the model are written somewhere before the error is raised.

    Raises:
        OutputError: in place of the error, with the folder that holds the weights, or saying that none had room.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ClueFastError) and not isinstance(error, OutputError):
            raise  # the weights themselves are at fault, such as with NaN
        folder = _rescue(model, Path(output_dir))
        where = (
            f"the trained weights are in {folder}"
            if folder is not None
            else "no folder had room for the trained weights; from Python, they are still in the model"
        )
        raise OutputError(f"{output_dir} could not be written after training ({_reason(error)}); {where}") from error


def weight_bytes(model: nn.Module) -> int:
    """Bytes that the weights of a model take in a file; what is shared counts once."""
    tensors = {
        (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape): tensor.numel() * tensor.itemsize
        for tensor in model.state_dict().values()
    }
    return sum(tensors.values())


def _rescue(model: nn.Module, output: Path) -> Path | None:
    """Writes the weights beside the output, or else where there is room; returns the folder, or None."""
    for parent in dict.fromkeys((output.parent, Path.cwd(), Path(tempfile.gettempdir()))):
        try:
            folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{output.name}.trained."))
        except OSError:
            continue
        try:
            safetensors.torch.save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        except (OSError, safetensors.SafetensorError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            model.config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        except Exception as error:
            logger.warning("the configuration could not be written beside the weights: %s", error)
        return folder
    return None


def _reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16) or tensor.numel() <= 1


def _corner(tensor: Tensor) -> Tensor:
    return tensor.as_strided((1,), (1,)) if tensor.numel() else tensor
