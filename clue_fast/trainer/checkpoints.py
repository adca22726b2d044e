"""Checkpoints that are whole or not there: written beside their place, then moved into it in one step.

Saving that does not fail at the end: tried before training, and trained weights kept somewhere if it fails after.
"""

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

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

STAGING = ".unfinished"
"""Folder in the output folder that holds a checkpoint while it is written; left behind by a run that was killed."""


class WholeCheckpoints(_Base):
    """Mixin of a ``transformers.Trainer``: a run that is killed while it saves leaves the checkpoints from before.

    The name ``checkpoint-N`` appears when everything is in it, so that the last one can always be resumed from.
    """

    _staging = False

    def _get_output_dir(self, trial: Any) -> str:
        folder: str = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.push_to_hub:  # uploads read the folder that was written, later
            super()._save_checkpoint(model, trial)
            return
        run = Path(self._get_output_dir(trial))
        staging = run / STAGING
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self._renamed_best(staging, run) and self.args.should_save:
            self.state.save_to_json(str(staging / f"checkpoint-{self.state.global_step}" / "trainer_state.json"))
        if self.args.should_save:
            _move(staging / f"checkpoint-{self.state.global_step}", run)
            staging.rmdir()
            self._rotate(run)
        self.accelerator.wait_for_everyone()

    def _renamed_best(self, staging: Path, run: Path) -> bool:
        """Gives the best checkpoint the path it will have. Returns whether it is the one just written."""
        best = self.state.best_model_checkpoint
        if best is None or Path(best).parent != staging:
            return False
        self.state.best_model_checkpoint = str(run / Path(best).name)
        return True

    def _rotate(self, run: Path) -> None:
        """Deletes the oldest checkpoints beyond ``save_total_limit``, but neither the newest nor the best."""
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {run / f"checkpoint-{self.state.global_step}", Path(self.state.best_model_checkpoint or run)}
        # By time, since the folder may hold checkpoints of an earlier run that went further.
        checkpoints = sorted(run.glob("checkpoint-[0-9]*"), key=lambda path: path.stat().st_mtime)
        spare = [path for path in checkpoints if path not in kept]
        for path in spare[: max(0, len(checkpoints) - limit)]:
            shutil.rmtree(path, ignore_errors=True)


def _move(checkpoint: Path, folder: Path) -> None:
    """Moves a checkpoint into a folder, in the place of one of that name."""
    target = folder / checkpoint.name
    if target.exists():
        old = checkpoint.parent / "replaced"
        os.replace(target, old)
        os.replace(checkpoint, target)
        shutil.rmtree(old)
    else:
        os.replace(checkpoint, target)


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
