"""Models from and to the disk: loading, checkpoints on the way, and saving at the end.

A checkpoint is whole or not there: it is written beside its place, then moved into it in one step. The saving at the
end does not fail: it is tried before training, and trained weights are kept somewhere if it fails after.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from clue_fast.config import ModelConfig
from clue_fast.errors import ClueFastError, ModelError, NonFiniteError, OutputError
from clue_fast.files import check_output, existing_parent
from clue_fast.internals import output_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

logger = logging.getLogger(__name__)

STAGING = ".unfinished"
"""Folder in the output folder that holds a checkpoint while it is written; left behind by a run that was killed."""


def load_model(
    name: str | os.PathLike[str],
    *,
    device: str | None = ModelConfig.device,
    dtype: str = ModelConfig.dtype,
    trust_remote_code: bool = ModelConfig.trust_remote_code,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer from a folder or from the hub.

    Args:
        name: of the folder, or on the hub.
        device, dtype, trust_remote_code: see ``clue_fast.config.ModelConfig``.

    Raises:
        ModelError: there is no such model, it cannot be read, or there is no such device.
        UnknownNameError: no such dtype.
    """
    ModelConfig(device, dtype, trust_remote_code)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, dtype=dtype)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load the model {name}: {reason[0]} "
            "Name a folder with a Hugging Face checkpoint, or a model of the hub"
        ) from error
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(place)), tokenizer  # type: ignore[arg-type]
    except (RuntimeError, AssertionError) as error:
        why = str(error).strip().splitlines()[0]
        raise ModelError(f"device {place!r} cannot be used: {why}; choose another, such as cpu") from error


def check_weights(model: nn.Module) -> None:
    """Raises NonFiniteError naming the first weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"the weight {name} holds NaN or infinity; load the model again or repair it")


class WholeCheckpoints:
    """Checkpoints of a ``transformers.Trainer``: a run that is killed while it saves leaves those from before.

    The name ``checkpoint-N`` appears when everything is in it, so that the last one can always be resumed from. Both
    methods stand around one of the trainer's own, ``inner``.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._staging = False

    def output_dir(self, inner: Callable[[Any], str], trial: Any) -> str:
        """Stands around how a trainer says where it writes: says where to write."""
        folder = inner(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def save(self, inner: Callable[[Any, Any], None], model: Any, trial: Any) -> None:
        """Stands around how a trainer writes a checkpoint."""
        trainer = self.trainer
        if trainer.args.push_to_hub:  # uploads read the folder that was written, later
            inner(model, trial)
            return
        run = Path(output_dir(trainer, trial))
        staging = run / STAGING
        if trainer.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        self._staging = True
        try:
            inner(model, trial)
        finally:
            self._staging = False
        trainer.accelerator.wait_for_everyone()
        name = f"checkpoint-{trainer.state.global_step}"
        if self._renamed_best(staging, run) and trainer.args.should_save:
            trainer.state.save_to_json(str(staging / name / "trainer_state.json"))
        if trainer.args.should_save:
            _move(staging / name, run)
            staging.rmdir()
            self._rotate(run)
        trainer.accelerator.wait_for_everyone()

    def _renamed_best(self, staging: Path, run: Path) -> bool:
        """Gives the best checkpoint the path it will have. Returns whether it is the one just written."""
        state = self.trainer.state
        best = state.best_model_checkpoint
        if best is None or Path(best).parent != staging:
            return False
        state.best_model_checkpoint = str(run / Path(best).name)
        return True

    def _rotate(self, run: Path) -> None:
        """Deletes the oldest checkpoints beyond ``save_total_limit``, but neither the newest nor the best."""
        limit = self.trainer.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {
            run / f"checkpoint-{self.trainer.state.global_step}",
            Path(self.trainer.state.best_model_checkpoint or run),
        }
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
