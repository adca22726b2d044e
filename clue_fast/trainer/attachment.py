"""Trains selected units with a ``transformers.Trainer`` that somebody else wrote.

Nothing of it is replaced: some methods of the one instance are wrapped, and ``Sparse.restore`` takes them off again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clue_fast.config import LAYER_LR
from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import SparseError
from clue_fast.internals import OUTPUT_DIR, SAVE_CHECKPOINT
from clue_fast.selection import Selection
from clue_fast.sparse import LayerRate, Sparse, sparsify
from clue_fast.trainer.sparse_training import SparseTraining

if TYPE_CHECKING:
    from transformers import Trainer


@renamed_arguments(master=precision)
def attach(
    trainer: Trainer,
    selection: Selection,
    *,
    layer_lr: LayerRate = LAYER_LR,
    master_weights: bool = True,
    stochastic_rounding: bool = False,
) -> Sparse:
    """Makes any ``transformers.Trainer`` train selected units only, its own loss and data unchanged.

    The trainer stays what it is: it makes ``SparseAdamW`` from its arguments, and checkpoints that are whole or not
    there. To tell forget from retain records, where the selection has units that only forgetting may touch, the inputs
    must hold both under "forget" and "retain", as in open-unlearning, and the model must be run on one of them at a
    time.

    The trainer gets the attributes ``sparse``; ``memory``, ``inner_optimizer`` and ``reselect``, as ``UnlearnTrainer``
    has them; and ``sparse_training``, see ``SparseTraining``.

    Args:
        trainer: any subclass, before ``train``.
        selection: the units to train, made for the trainer's model.
        layer_lr, master_weights, stochastic_rounding: see ``SparseAdamW``.

    Returns:
        The ``Sparse`` of the model; ``restore()`` turns back the model and the trainer.

    Raises:
        SparseError: the trainer has an optimizer already, was attached to before, or shards the weights.
        SettingError: see ``check_precision`` in ``clue_fast.sparse.optimizer``.
        SelectionError, NonFiniteError: see ``sparsify``.
    """
    if getattr(trainer, "sparse_training", None) is not None:
        raise SparseError("the trainer trains selected units already; attach to it once")
    if trainer.optimizer is not None:
        raise SparseError(
            f"the trainer has a {type(trainer.optimizer).__name__} already, which knows nothing of selected units; "
            "attach before it is made"
        )
    assert trainer.model is not None
    sparse = sparsify(trainer.model, selection)
    try:
        training = SparseTraining(trainer, sparse, layer_lr, master_weights, stochastic_rounding)
        sparse.hooks.append(_Attachment(trainer, training))
        if any(trained.category == "forget" for trained in sparse.slices):
            track_forget_retain_inputs(trainer, sparse)
    except BaseException:
        sparse.restore()
        raise
    return sparse


class InstanceHooks:
    """Attributes of one object that hide those of its class, or earlier ones of its own, until they are removed."""

    def __init__(self, holder: Any) -> None:
        self.holder = holder
        self.before: dict[str, tuple[Any, ...]] = {}
        self.set: dict[str, Any] = {}

    def put(self, name: str, value: Any) -> None:
        """Sets an attribute."""
        own = vars(self.holder)
        self.before.setdefault(name, (own[name],) if name in own else ())
        own[name] = self.set[name] = value

    def wrap(self, name: str, around: Callable[..., Any]) -> None:
        """Has a method call ``around``, which gets the method before its arguments."""
        self.put(name, partial(around, getattr(self.holder, name)))

    def remove(self) -> None:
        """Lets what was hidden be seen again; what somebody else has set since stays."""
        own = vars(self.holder)
        for name, before in self.before.items():
            if own.get(name) is self.set[name]:
                del own[name]
                if before:
                    own[name] = before[0]
        self.before, self.set = {}, {}


class _Attachment(InstanceHooks):
    """Has the methods of a trainer ask its ``SparseTraining``."""

    def __init__(self, trainer: Trainer, training: SparseTraining) -> None:
        super().__init__(trainer)
        self.training = training
        self.put("sparse", training.sparse)
        self.put("sparse_training", training)
        self.put("memory", training.memory)
        self.put("further_logs", training.further_logs)
        self.put("reselect", training.reselect)
        self.put("create_optimizer", self._create_optimizer)
        self.wrap("train", training.train)
        self.wrap("create_scheduler", training.create_scheduler)
        self.wrap("log", self._log)
        self.wrap(OUTPUT_DIR, training.checkpoints.output_dir)
        self.wrap(SAVE_CHECKPOINT, training.checkpoints.save)

    def _create_optimizer(self, model: Any = None) -> Any:
        optimizer = self.training.create_optimizer()
        self.put("inner_optimizer", self.training.optimizer)
        return optimizer

    def _log(self, inner: Callable[..., None], logs: dict[str, float], start_time: float | None = None) -> None:
        self.training.log(inner, logs, start_time)

    def remove(self) -> None:
        """Leaves the trainer without an optimizer too, since that of selected units has nothing left to train."""
        super().remove()
        self.holder.remove_callback(self.training)
        self.holder.optimizer = self.holder.lr_scheduler = None


def track_forget_retain_inputs(trainer: Trainer, sparse: Sparse) -> None:
    """Watches which side's tensors the model of a trainer is run on, pass by pass, until the model is restored.

    Raises:
        SparseError: gradient checkpointing is on; or, in a pass, the tensors are of neither side.
    """
    if trainer.args.gradient_checkpointing:
        raise SparseError(
            "gradient checkpointing runs layers again when it is no longer known which side a pass was of; turn it "
            "off, select no forget units, or use UnlearnTrainer, which runs both sides in one pass"
        )
    current: list[Any] = []

    def compute_loss(inner: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        current.append(inputs)
        try:
            return inner(model, inputs, *args, **kwargs)
        finally:
            current.pop()

    def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if current:
            _tell_layout(
                sparse, current[-1], [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            )

    hooks = InstanceHooks(trainer)
    hooks.wrap("compute_loss", compute_loss)
    sparse.hooks.append(hooks)
    sparse.hooks.append(sparse.model.register_forward_pre_hook(tell, with_kwargs=True, prepend=True))


def _tell_layout(sparse: Sparse, inputs: Any, given: list[Tensor]) -> None:
    """Says of which side the tensors are that the model is run on."""
    if not isinstance(inputs, Mapping) or not {"forget", "retain"} & set(inputs):
        return
    for side in ("forget", "retain"):
        own = {id(tensor) for tensor in _tensors(inputs.get(side))}
        if any(id(tensor) in own for tensor in given):
            records, tokens = given[0].shape[0], given[0].shape[1] if given[0].dim() > 1 else 1
            sparse.set_batch_layout(records if side == "forget" else 0, records, tokens)
            return
    raise SparseError(
        "the model is run on tensors that are neither of the forget nor of the retain inputs, so it cannot be told "
        "which units may train; pass inputs on as they are, or select conflict units only"
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
