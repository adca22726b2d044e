"""AdamW on the selected weights."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from clue_fast import ops
from clue_fast.training.layer_rates import LayerRate
from clue_fast.training.optimizer import SparseOptimizer, check_not_below_zero, gradient, matrices
from clue_fast.training.parts import TrainedPart


class SparseAdamW(SparseOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on the trained part of a sparse model.

    The update of a master value is that of ``torch.optim.AdamW``. See ``SparseOptimizer`` for the rest.

    Args:
        model: after ``sparsify``.
        lr: learning rate of the first layer of the model.
        betas, eps: as in Adam.
        weight_decay: decoupled, applied to selected weights only.
        layer_lr, master, seed: see ``SparseOptimizer``.

    Raises:
        SparseError: the model is not sparse.
        UnknownNameError: no such master.
        ValueError: an argument is out of range.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        layer_lr: LayerRate = 1.0,
        master: str = "fp32",
        seed: int = 0,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas {betas} are outside [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_not_below_zero(defaults, ("eps",))
        super().__init__(model, defaults, layer_lr, master, seed)

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(group["betas"]), group["eps"]

    def _launch(self, entries: list[tuple[TrainedPart, dict[str, Any]]]) -> None:
        parts = [part for part, _ in entries]
        group = entries[0][1]
        values, seeds = self._masters(parts)
        ops.sparse_adamw_(
            values,
            matrices(gradient(part) for part in parts),
            self._moments("exp_avg", parts),
            self._moments("exp_avg_sq", parts),
            matrices(part.weight for part in parts),
            [part.index for part in parts],
            [part.dim for part in parts],
            *self._numbers(entries),
            group["betas"],
            group["eps"],
            seed=seeds,
        )
