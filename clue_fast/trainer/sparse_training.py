"""What a ``transformers.Trainer`` does otherwise when it trains selected units only.

``SparseTraining`` knows it once, for ``UnlearnTrainer``, whose methods ask it, and for a trainer that somebody else
wrote, whose methods ``clue_fast.attach`` wraps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from clue_fast.errors import SiteError, SparseError
from clue_fast.internals import give_back_memory
from clue_fast.recording import Patched, patch, patched_of
from clue_fast.selection import Selection
from clue_fast.sites import Survey
from clue_fast.sparse import LayerRate, Sparse, SparseAdamW, SparseSGD
from clue_fast.sparse.optimizer import SparseOptimizer, check_precision
from clue_fast.sparse.slices import trainable_slices
from clue_fast.trainer.checkpoints import WholeCheckpoints
from clue_fast.trainer.stages import UNITS

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def fused(model: nn.Module, found: Survey | None = None) -> Iterator[Patched | None]:
    """Patches the model, so that its MLPs are fused, for as long as the context lasts.

    Yields None, and leaves the model alone, where it is patched already or has nothing to fuse, such as heads alone.

    Args:
        model: changed in place.
        found: its sites, where somebody has looked for them already.
    """
    try:
        patched = None if patched_of(model) is not None else patch(model, found=found, strict=False)
    except SiteError:
        patched = None
    if patched is None:
        yield None
        return
    with patched:
        yield patched


class SparseTraining(TrainerCallback):
    """The training of a sparse model by a ``transformers.Trainer``; also a callback of it.

    Methods with an argument ``inner`` stand around the method of the trainer of the same name, which that is.

    Args:
        trainer: before ``train``, without an optimizer.
        sparse: of its model.
        layer_lr, master_weights, stochastic_rounding: see ``SparseOptimizer``.

    Attributes:
        memory: bytes by kind (see ``Sparse.memory_footprint``) as counted right after the first optimizer step.
        patched: the model, whose MLPs are fused while it trains: they keep gate and up for the backward, and nothing
            else of their width. None outside of ``train``, or where there is nothing to fuse.
        further_logs: called whenever a loss is logged, for figures to log beside it.
        checkpoints: which are whole or not there.

    Raises:
        SparseError: the training is distributed in a way that shards the weights, or ``args.optim`` is an optimizer
            that cannot train selected weights.
        SettingError: see ``check_precision``.
    """

    def __init__(
        self, trainer: Trainer, sparse: Sparse, layer_lr: LayerRate, master_weights: bool, stochastic_rounding: bool
    ) -> None:
        check_precision(sparse.slices, master_weights, stochastic_rounding)
        _check_distribution(trainer)
        _optimizer_name(trainer.args)
        self.trainer, self.sparse, self.layer_lr = trainer, sparse, layer_lr
        self.precision = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        self.memory: dict[str, int] = {}
        self.patched: Patched | None = None
        self.further_logs: list[Callable[[], dict[str, float]]] = []
        self.checkpoints = WholeCheckpoints(trainer)
        self._fusing = ExitStack()
        trainer.add_callback(self)

    @property
    def optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        optimizer = self.trainer.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def train(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; the model is patched as long as it lasts."""
        with self._fusing:
            self._fuse()
            result = inner(*args, **kwargs)
        give_back_memory()
        return result

    def _fuse(self) -> None:
        self._fusing.callback(setattr, self, "patched", None)
        self.patched = self._fusing.enter_context(fused(self.sparse.model))

    def create_optimizer(self) -> torch.optim.Optimizer:
        """Makes the ``SparseAdamW`` or ``SparseSGD`` that ``args`` ask for, unless an optimizer was given."""
        trainer, args = self.trainer, self.trainer.args
        if trainer.optimizer is None:
            common: dict[str, Any] = {
                "lr": args.learning_rate,
                "weight_decay": args.weight_decay,
                "layer_lr": self.layer_lr,
                "seed": args.seed,
                **self.precision,
            }
            if _optimizer_name(args) == "sgd":
                trainer.optimizer = SparseSGD(self.sparse.model, momentum=_momentum(args), **common)
            else:
                betas = args.adam_beta1, args.adam_beta2
                trainer.optimizer = SparseAdamW(self.sparse.model, betas=betas, eps=args.adam_epsilon, **common)
        optimizer: torch.optim.Optimizer = trainer.optimizer
        return optimizer

    def create_scheduler(self, inner: Callable[..., Any], num_training_steps: int, optimizer: Any = None) -> Any:
        """Makes the schedule of ``args``, with fewer steps of warm-up where they would be all the steps there are.

        The first step of a warm-up has a rate of 0: a training of that one step would train nothing.
        """
        args = self.trainer.args
        given = args.warmup_steps
        args.warmup_steps = min(args.get_warmup_steps(num_training_steps), max(0, num_training_steps - 1))
        try:
            return inner(num_training_steps, optimizer)
        finally:
            args.warmup_steps = given

    def log(
        self, inner: Callable[[dict[str, float], float | None], None], logs: dict[str, float], start_time: float | None
    ) -> None:
        """Adds the steps skipped so far, and ``further_logs``, to the logs of the training."""
        if "loss" in logs:
            logs["skipped_steps"] = getattr(self.optimizer, "skipped_steps", 0)
            for figures in self.further_logs:
                logs |= figures()
        inner(logs, start_time)

    def reselect(self, selection: Selection) -> None:
        """Goes on with other units, see ``Sparse.reselect`` and ``SparseOptimizer.rebuild_param_groups``.

        Raises:
            SparseError: several processes train, and DistributedDataParallel keeps to the parameters it began with;
                or see there.
            SelectionError, NonFiniteError: see ``sparsify``.
        """
        if self.trainer.args.world_size > 1:
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
        self.optimizer.rebuild_param_groups(self.sparse.model)

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the optimizer, which may have been given."""
        _check_optimizer(self.optimizer, self.sparse.model)
        self.sparse.limit_checkpointing()

    def on_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts bytes, when gradients and optimizer state are all there."""
        if not self.memory:
            self.memory.update(self.sparse.memory_footprint(self.optimizer))

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Lets all units train again, whatever the last stage did."""
        self.sparse.train_only(*UNITS)


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
    raise SparseError(
        f"a Trainer with {system} shards the weights that the optimizer writes selected units into; leave it out, and "
        "train with DistributedDataParallel, or shard the model with clue_fast.sparse.fully_shard in a loop of your own"
    )


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


def _check_optimizer(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, SparseOptimizer):
        raise SparseError(
            f"{type(optimizer).__name__} would train master values and never write them into the weights; "
            "use SparseAdamW, or leave the optimizer to the trainer"
        )
    own = {id(trained.values) for trained in trainable_slices(model)}
    if not {id(p) for group in optimizer.param_groups for p in group["params"]} <= own:
        raise SparseError("the optimizer trains another model; make it on the model of this trainer, after sparsify")
