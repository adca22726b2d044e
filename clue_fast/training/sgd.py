"""Stochastic gradient descent on the selected weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from clue_fast import ops
from clue_fast.training.layer_rates import LayerRate
from clue_fast.training.optimizer import SparseOptimizer, check_not_below_zero, gradient, matrices
from clue_fast.training.parts import TrainedPart


class SparseSGD(SparseOptimizer):
    """SGD with momentum (Sutskever et al. 2013) on the trained part of a sparse model, as ``torch.optim.SGD``.

    See ``SparseOptimizer`` for what it shares with ``SparseAdamW``.

    Args:
        model: after ``sparsify``.
        lr: learning rate of the first layer of the model.
        momentum: how much of the last direction is kept; at 0 there is no state but the count of steps.
        weight_decay: added to the gradient, times the weight; selected weights only.
        layer_lr, master, seed: see ``SparseOptimizer``.

    Raises:
        SparseError: the model is not sparse.
        UnknownNameError: no such master.
        ValueError: an argument is out of range.
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        layer_lr: LayerRate = 1.0,
        master: str = "fp32",
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        check_not_below_zero(defaults, ("momentum",))
        super().__init__(model, defaults, layer_lr, master, seed)

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group.get("momentum") else ()

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return (group["momentum"],)

    def _launch(self, entries: list[tuple[TrainedPart, dict[str, Any]]]) -> None:
        parts = [part for part, _ in entries]
        momentum = entries[0][1]["momentum"]
        values, seeds = self._masters(parts)
        ops.sparse_sgd_(
            values,
            matrices(gradient(part) for part in parts),
            self._moments("momentum_buffer", parts) if momentum else None,
            matrices(part.weight for part in parts),
            [part.index for part in parts],
            [part.dim for part in parts],
            *self._numbers(entries),
            momentum,
            seed=seeds,
        )
