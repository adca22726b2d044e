"""The model of a training, patched so that its MLPs are fused.

What a ``transformers.Trainer`` needs in order to train selected units only.

Trains selected units with a Trainer that somebody else wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import SiteError, SparseError
from clue_fast.recording import Patched, patch, patched_of
from clue_fast.selection import Selection
from clue_fast.sparse import LayerRate, Sparse, SparseAdamW, SparseSGD, sparsify
from clue_fast.sparse.optimizer import SparseOptimizer, check_precision
from clue_fast.sparse.slices import DDP, trainable_slices
from clue_fast.trainer.checkpoints import WholeCheckpoints
from clue_fast.trainer.stages import UNITS

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def fused(model: nn.Module) -> Iterator[Patched | None]:
    """Patches the model for as long as the context lasts.

    Yields None, and leaves the model alone, where it is patched already or has nothing to fuse, such as heads alone.
    """
    try:
        patched = None if patched_of(model) is not None else patch(model, strict=False)
    except SiteError:
        patched = None
    if patched is None:
        yield None
        return
    with patched:
        yield patched


if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


class SparseTraining(WholeCheckpoints, _Base):
    """Mixin of a ``transformers.Trainer`` whose model is sparse.

    Attributes:
        sparse: the ``Sparse`` of the model.
        layer_lr, master_weights, stochastic_rounding: see ``SparseOptimizer``.
        memory: bytes by kind (see ``Sparse.memory_footprint``) as counted right after the first optimizer step.
        patched: the model, whose MLPs are fused while it trains: they keep gate and up for the backward, and nothing
            else of their width. None outside of ``train``, or where there is nothing to fuse.
        further_logs: called whenever a loss is logged, for figures to log beside it.
    """

    sparse: Sparse
    layer_lr: LayerRate
    master_weights: bool
    stochastic_rounding: bool
    memory: dict[str, int]
    patched: Patched | None
    further_logs: list[Callable[[], dict[str, float]]]

    def host(self, sparse: Sparse, layer_lr: LayerRate, master_weights: bool, stochastic_rounding: bool) -> None:
        """Takes charge of a sparse model.

        Raises:
            SparseError: the training is distributed in a way that shards the weights, or ``args.optim`` is an
                optimizer that cannot train selected weights.
            SettingError: see ``check_precision``.
        """
        check_precision(sparse.slices, master_weights, stochastic_rounding)
        self.sparse, self.layer_lr, self.memory = sparse, layer_lr, {}
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding
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
                "master_weights": self.master_weights,
                "stochastic_rounding": self.stochastic_rounding,
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
        """Goes on with other units, see ``Sparse.reselect`` and ``SparseOptimizer.rebuild_param_groups``.

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
        self.inner_optimizer.rebuild_param_groups(self.sparse.model)

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
            self.trainer.memory = self.trainer.sparse.memory_footprint(self.trainer.inner_optimizer)

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
    own = {id(trained.values) for trained in trainable_slices(trainer.sparse.model)}
    if not {id(p) for group in optimizer.param_groups for p in group["params"]} <= own:
        raise SparseError("the optimizer trains another model; make it on the model of this trainer, after sparsify")


@renamed_arguments(master=precision)
def attach(
    trainer: Trainer,
    selection: Selection,
    *,
    layer_lr: LayerRate = 0.2,
    master_weights: bool = True,
    stochastic_rounding: bool = False,
) -> Sparse:
    """Makes any ``transformers.Trainer`` train selected units only, its own loss and data unchanged.

    The trainer keeps its class, and becomes an instance of a subclass of it: with ``SparseAdamW`` made from its
    arguments, and checkpoints that are whole or not there. To tell forget from retain records, where the selection
    has units that only forgetting may touch, the inputs must hold both under "forget" and "retain", as in
    open-unlearning, and the model must be run on one of them at a time.

    Args:
        trainer: any subclass, before ``train``.
        selection: the units to train, made for the trainer's model.
        layer_lr, master_weights, stochastic_rounding: see ``SparseAdamW``.

    Returns:
        The ``Sparse`` of the model; ``restore()`` turns the model back.

    Raises:
        SparseError: the trainer has an optimizer already, was attached to before, or shards the weights.
        SettingError: see ``check_precision`` in ``clue_fast.sparse.optimizer``.
        SelectionError, NonFiniteError: see ``sparsify``.
    """
    if isinstance(trainer, SparseTraining):
        raise SparseError("the trainer trains selected units already; attach to it once")
    if trainer.optimizer is not None:
        raise SparseError(
            f"the trainer has a {type(trainer.optimizer).__name__} already, which knows nothing of selected units; "
            "attach before it is made"
        )
    assert trainer.model is not None
    sparse = sparsify(trainer.model, selection)
    before = type(trainer)
    trainer.__class__ = type(before.__name__, (_Attached, before), {"__module__": before.__module__})
    try:
        attached: Any = trainer
        attached.host(sparse, layer_lr, master_weights, stochastic_rounding)
        if any(trained.category == "forget" for trained in sparse.slices):
            attached.tell_sides_apart()
    except BaseException:
        trainer.__class__ = before
        sparse.restore()
        raise
    return sparse


class _Attached(SparseTraining):
    _inputs: Mapping[str, Any] | None = None

    def tell_sides_apart(self) -> None:
        """Watches which side's tensors the model is run on, pass by pass."""
        if self.args.gradient_checkpointing:
            raise SparseError(
                "gradient checkpointing runs layers again when it is no longer known which side a pass was of; turn "
                "it off, select no forget units, or use UnlearnTrainer, which runs both sides in one pass"
            )
        hook = self.sparse.model.register_forward_pre_hook(self._announce, with_kwargs=True, prepend=True)
        self.sparse.hooks.append(hook)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own loss."""
        self._inputs = inputs
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._inputs = None

    def _announce(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not isinstance(self._inputs, Mapping) or not {"forget", "retain"} & set(self._inputs):
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for side in ("forget", "retain"):
            own = {id(tensor) for tensor in _tensors(self._inputs.get(side))}
            if any(id(tensor) in own for tensor in given):
                records, tokens = given[0].shape[0], given[0].shape[1] if given[0].dim() > 1 else 1
                self.sparse.set_batch_layout(records if side == "forget" else 0, records, tokens)
                return
        raise SparseError(
            "the model is run on tensors that are neither of the forget nor of the retain inputs, so it cannot be "
            "told which units may train; pass inputs on as they are, or select conflict units only"
        )


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping):
        for value in inputs.values():
            yield from _tensors(value)
    elif isinstance(inputs, (list, tuple)):
        for value in inputs:
            yield from _tensors(value)
