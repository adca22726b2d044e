"""What a ``transformers.Trainer`` needs in order to train selected units only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from clue_fast.errors import SparseError
from clue_fast.training.adamw import SparseAdamW
from clue_fast.training.checkpoints import WholeCheckpoints
from clue_fast.training.layer_rates import LayerRate
from clue_fast.training.optimizer import SparseOptimizer
from clue_fast.training.parts import DDP, trained_parts
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
    """

    sparse: Sparse
    layer_lr: LayerRate
    master: str
    memory: dict[str, int]

    def host(self, sparse: Sparse, layer_lr: LayerRate, master: str) -> None:
        """Takes charge of a sparse model.

        Raises:
            SparseError: the training is distributed in a way that shards the weights.
        """
        self.sparse, self.layer_lr, self.master, self.memory = sparse, layer_lr, master, {}
        _check_distribution(self)
        self.add_callback(_Bookkeeping(self))

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the ``SparseAdamW``, unless an optimizer was given."""
        if self.optimizer is None:
            self.optimizer = SparseAdamW(
                self.sparse.model,
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
                weight_decay=self.args.weight_decay,
                layer_lr=self.layer_lr,
                master=self.master,
                seed=self.args.seed,
            )
        return self.optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the steps skipped so far to the logs of the training."""
        if "loss" in logs:
            logs["skipped_steps"] = getattr(self.inner_optimizer, "skipped_steps", 0)
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
