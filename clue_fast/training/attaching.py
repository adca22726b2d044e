"""Trains selected units with a Trainer that somebody else wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clue_fast.errors import SparseError
from clue_fast.selection import Selection
from clue_fast.training.hosting import SparseTraining
from clue_fast.training.layer_rates import LayerRate
from clue_fast.training.sparse import Sparse, sparsify

if TYPE_CHECKING:
    from transformers import Trainer


def attach(trainer: Trainer, selection: Selection, *, layer_lr: LayerRate = 0.2, master: str = "fp32") -> Sparse:
    """Makes any ``transformers.Trainer`` train selected units only, its own loss and data unchanged.

    The trainer keeps its class, and becomes an instance of a subclass of it: with ``SparseAdamW`` made from its
    arguments, and checkpoints that are whole or not there. To tell forget from retain records, where the selection
    has units that only forgetting may touch, the inputs must hold both under "forget" and "retain", as in
    open-unlearning, and the model must be run on one of them at a time.

    Args:
        trainer: any subclass, before ``train``.
        selection: the units to train, made for the trainer's model.
        layer_lr, master: see ``SparseAdamW``.

    Returns:
        The ``Sparse`` of the model; ``restore()`` turns the model back.

    Raises:
        SparseError: the trainer has an optimizer already, was attached to before, or shards the weights.
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
        attached.host(sparse, layer_lr, master)
        if any(part.category == "forget" for part in sparse.parts):
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
                self.sparse.reach(records if side == "forget" else 0, records, tokens)
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
