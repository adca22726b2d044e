"""What a ``transformers.Trainer`` needs in order to train selected units only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from clue_fast.errors import SparseError
from clue_fast.patching import Patched
from clue_fast.selection import Selection
from clue_fast.training.adamw import SparseAdamW
from clue_fast.training.checkpoints import WholeCheckpoints
from clue_fast.training.fusing import fused
from clue_fast.training.layer_rates import LayerRate
from clue_fast.training.optimizer import SparseOptimizer
from clue_fast.training.parts import DDP, trained_parts
from clue_fast.training.sgd import SparseSGD
from clue_fast.training.sparse import Sparse
from clue_fast.training.stages import UNITS

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SparseTraining(WholeCheckpoints, _Base):
    """Mixin of a ``transformers.Trainer`` whose model is sparse.

    Attributes:
        sparse: the ``Sparse`` of the model.
        layer_lr, master: see ``SparseOptimizer``.
        memory: bytes by kind (see ``Sparse.bytes``) as counted right after the first optimizer step.
        patched: the model, whose MLPs are fused while it trains: they keep gate and up for the backward, and nothing
            else of their width. None outside of ``train``, or where there is nothing to fuse.
        further_logs: called whenever a loss is logged, for figures to log beside it.
    """

    sparse: Sparse
    layer_lr: LayerRate
    master: str
    memory: dict[str, int]
    patched: Patched | None
    further_logs: list[Callable[[], dict[str, float]]]

    def host(self, sparse: Sparse, layer_lr: LayerRate, master: str) -> None:
        """Takes charge of a sparse model.

        Raises:
            SparseError: the training is distributed in a way that shards the weights, or ``args.optim`` is an
                optimizer that cannot train selected weights.
        """
        self.sparse, self.layer_lr, self.master, self.memory = sparse, layer_lr, master, {}
        self.patched, self._fusing, self.further_logs = None, ExitStack(), []
        _check_distribution(self)
        _optimizer_name(self.args)
        self.add_callback(_Bookkeeping(self))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; the model is patched as long as it lasts."""
        with self._fusing:
            self._fuse()
            return super().train(*args, **kwargs)

    def _fuse(self) -> None:
        self._fusing.callback(setattr, self, "patched", None)
        self.patched = self._fusing.enter_context(fused(self.sparse.model))

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the ``SparseAdamW`` or ``SparseSGD`` that ``args`` ask for, unless an optimizer was given."""
        if self.optimizer is None:
            common: dict[str, Any] = {
                "lr": self.args.learning_rate,
                "weight_decay": self.args.weight_decay,
                "layer_lr": self.layer_lr,
                "master": self.master,
                "seed": self.args.seed,
            }
            if _optimizer_name(self.args) == "sgd":
                self.optimizer = SparseSGD(self.sparse.model, momentum=_momentum(self.args), **common)
            else:
                betas = self.args.adam_beta1, self.args.adam_beta2
                self.optimizer = SparseAdamW(self.sparse.model, betas=betas, eps=self.args.adam_epsilon, **common)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule of ``args``, with fewer steps of warm-up where they would be all the steps there are.

        The first step of a warm-up has a rate of 0: a training of that one step would train nothing.
        """
        given = self.args.warmup_steps
        self.args.warmup_steps = min(self.args.get_warmup_steps(num_training_steps), max(0, num_training_steps - 1))
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.warmup_steps = given

    def reselect(self, selection: Selection) -> None:
        """Goes on with other units, see ``Sparse.reselect`` and ``SparseOptimizer.follow``.

        Raises:
            SparseError: several processes train, and DistributedDataParallel keeps to the parameters it began with;
                or see there.
            SelectionError, NonFiniteError: see ``sparsify``.
        """
        if self.args.world_size > 1:
            raise SparseError(
                "DistributedDataParallel keeps to the parameters it began with; to select anew, end the training and "
                "start another, or train on one process"
            )
        was_fused = self.patched is not None
        self._fusing.close()
        try:
            self.sparse.reselect(selection)
        finally:
            if was_fused:
                self._fuse()
        self.inner_optimizer.follow(self.sparse.model)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the steps skipped so far, and ``further_logs``, to the logs of the training."""
        if "loss" in logs:
            logs["skipped_steps"] = getattr(self.inner_optimizer, "skipped_steps", 0)
            for figures in self.further_logs:
                logs |= figures()
        super().log(logs, start_time)


class _Bookkeeping(TrainerCallback):
    """Checks the optimizer, and counts bytes when gradients and optimizer state are all there."""

    def __init__(self, trainer: SparseTraining) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        _check_optimizer(self.trainer)
        self.trainer.sparse.limit_checkpointing()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.memory:
            self.trainer.memory = self.trainer.sparse.bytes(self.trainer.inner_optimizer)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.sparse.train_only(*UNITS)


def _check_distribution(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled:
        system = "DeepSpeed ZeRO"
    elif trainer.is_fsdp_enabled or getattr(trainer, "is_fsdp_xla_enabled", False):
        system = "FSDP"
    elif trainer.args.n_gpu > 1:
        raise SparseError(
            "DataParallel copies the model for every step, and the copies do not train; start one process for each "
            "GPU (torchrun or accelerate launch), or show it one GPU only (CUDA_VISIBLE_DEVICES=0)"
        )
    else:
        return
    raise SparseError(f"{system} shards the weights that the optimizer writes selected units into; leave it out, {DDP}")


def _optimizer_name(args: TrainingArguments) -> str:
    name = str(getattr(args.optim, "value", args.optim))
    if name not in ("adamw_torch", "adamw_torch_fused", "sgd"):
        raise SparseError(
            f"optim={name!r} cannot train selected weights; use adamw_torch or sgd, which run in one launch"
        )
    return name


def _momentum(args: TrainingArguments) -> float:
    """The momentum in ``args.optim_args``, such as "momentum=0.9"."""
    given = dict(item.split("=", 1) for item in (args.optim_args or "").replace(" ", "").split(",") if item)
    if unknown := sorted(set(given) - {"momentum"}):
        raise SparseError(f"optim_args sets {', '.join(unknown)}, SparseSGD knows momentum only")
    return float(given.get("momentum", 0.0))


def _check_optimizer(trainer: SparseTraining) -> None:
    optimizer = trainer.inner_optimizer
    if not isinstance(optimizer, SparseOptimizer):
        raise SparseError(
            f"{type(optimizer).__name__} would train master values and never write them into the weights; "
            "use SparseAdamW, or leave the optimizer to the trainer"
        )
    own = {id(part.selected) for part in trained_parts(trainer.sparse.model)}
    if not {id(p) for group in optimizer.param_groups for p in group["params"]} <= own:
        raise SparseError("the optimizer trains another model; make it on the model of this trainer, after sparsify")
