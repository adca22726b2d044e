"""AdamW over the selected weights: one launch for all layers, float32 masters, one learning rate a layer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.errors import SparseError
from clue_fast.training.layer_rates import LayerRate, layer_scale
from clue_fast.training.parts import TrainedPart, trained_parts

logger = logging.getLogger(__name__)


class SparseAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on the trained part of a sparse model.

    The update of a master value is that of ``torch.optim.AdamW``; the weight then takes the master value,
    rounded to nearest even. Moments exist for the trained part only. There is one parameter group a layer,
    with the keys ``layer`` and ``layer_scale``, so that schedulers and loggers see every rate.

    A step with a non-finite gradient changes nothing: it is logged with the modules concerned and counted in
    ``skipped_steps``.

    Args:
        model: after ``sparsify``.
        lr: learning rate of the first layer of the model.
        betas, eps: as in Adam.
        weight_decay: decoupled, applied to selected weights only.
        layer_lr: learning rate of the last layer over that of the first, geometric in between, or another
            rate by layer, see ``LayerRate``.

    Raises:
        SparseError: the model is not sparse.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        layer_lr: LayerRate = 1.0,
    ) -> None:
        _check_arguments(lr, betas, eps, weight_decay)
        by_layer: dict[int, list[TrainedPart]] = defaultdict(list)
        for part in trained_parts(model):
            by_layer[part.layer].append(part)
        if not by_layer:
            raise SparseError("the model trains no selected weights; call clue_fast.sparsify(model, selection) first")
        self.skipped_steps = 0
        self._part_of = {part.selected: part for parts in by_layer.values() for part in parts}
        groups = []
        for layer, parts in sorted(by_layer.items()):
            scale = layer_scale(layer_lr, layer, parts[0].layers)
            parameters = [part.selected for part in parts]
            groups.append({"params": parameters, "lr": lr * scale, "layer": layer, "layer_scale": scale})
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates masters and weights. Parameters without a gradient are skipped.

        Raises:
            SparseError: no parameter has a gradient, the masters are no longer float32, or the model holds
                its original weights at the moment.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._check_updates([p for p, _ in updates])
        if self._has_finite_gradients([p for p, _ in updates]):
            # One launch takes one pair of betas; they only differ if somebody edits the groups.
            launches: dict[Any, list[tuple[nn.Parameter, dict[str, Any]]]] = defaultdict(list)
            for parameter, group in updates:
                launches[group["betas"], group["eps"], parameter.device].append((parameter, group))
            for (betas, eps, _), entries in launches.items():
                self._launch(entries, betas, eps)
        return loss

    def _launch(
        self, entries: list[tuple[nn.Parameter, dict[str, Any]]], betas: tuple[float, float], eps: float
    ) -> None:
        parts = [self._part_of[p] for p, _ in entries]
        states = [self._advance(p) for p, _ in entries]
        ops.sparse_adamw_(
            _matrices([p.detach() for p, _ in entries]),
            _matrices(_gradients([p for p, _ in entries])),
            _matrices([state["exp_avg"] for state in states]),
            _matrices([state["exp_avg_sq"] for state in states]),
            _matrices([part.weight for part in parts]),
            [part.index for part in parts],
            [part.dim for part in parts],
            torch.tensor([float(group["lr"]) for _, group in entries], dtype=torch.float64),
            torch.tensor([float(group["weight_decay"]) for _, group in entries], dtype=torch.float64),
            torch.tensor([state["step"] for state in states], dtype=torch.int64),
            betas,
            eps,
        )
        # A forward from before this step must not be run backward with the weights from after it.
        torch.autograd.graph.increment_version([getattr(part.module, part.name) for part in parts])

    def _advance(self, parameter: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        return state

    def _check_updates(self, parameters: list[nn.Parameter]) -> None:
        if not parameters:
            raise SparseError(
                "no selected weight has a gradient; call backward() first (reentrant gradient checkpointing "
                "drops them: set use_reentrant=False, or call model.enable_input_require_grads())"
            )
        for parameter in parameters:
            part = self._part_of[parameter]
            if part.swapped:
                raise SparseError(f"{part.path} holds its original weights; step outside Sparse.original()")
            if parameter.dtype != torch.float32:
                raise SparseError(
                    f"the master values of {part.path} are {parameter.dtype}, they must stay float32; "
                    "cast the model before sparsify, not its parameters after"
                )

    def _has_finite_gradients(self, parameters: list[nn.Parameter]) -> bool:
        # The maximum norm takes 18 times as long on a CPU; only the other overflows for finite gradients.
        finite = _are_finite(torch._foreach_norm(_gradients(parameters)))
        if not all(finite):
            finite = _are_finite(torch._foreach_norm(_gradients(parameters), float("inf")))
        bad = [self._part_of[p].path for p, ok in zip(parameters, finite, strict=True) if not ok]
        if bad:
            self.skipped_steps += 1
            # Clipping by a norm that is not finite spoils every gradient; then the first name says little.
            where = "all of them" if len(bad) == len(parameters) else ", ".join(bad[:4])
            logger.warning(
                "skipped a step, the %d. so far: gradient not finite in %s (%d of %d weights)",
                self.skipped_steps, where, len(bad), len(parameters),
            )  # fmt: skip
        return not bad

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and also every ``master``, which a bfloat16 weight cannot hold, with its ``index``."""
        saved = super().state_dict()
        state = {
            number: {
                **saved["state"].get(number, {}),
                "master": p.detach(),
                "index": self._part_of[p].index,
            }
            for number, p in enumerate(self._parameters())
        }
        return {**saved, "state": state, "skipped_steps": self.skipped_steps}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores moments, steps, learning rates and masters, and writes the masters into the weights.

        Raises:
            SparseError: the state belongs to another selection, or to another optimizer.
        """
        parameters = self._parameters()
        state = state_dict["state"]
        for number, parameter in enumerate(parameters):
            part, saved = self._part_of[parameter], state.get(number, {})
            if "master" not in saved or saved["master"].shape != parameter.shape:
                raise SparseError(f"the optimizer state does not fit {part.path}; it is of another model or optimizer")
            if not torch.equal(saved["index"].cpu(), part.index.cpu()):
                raise SparseError(f"the optimizer state has other units of {part.path}; load its own selection")
        moments = {number: _moments(saved) for number, saved in state.items() if "step" in saved}
        super().load_state_dict({**state_dict, "state": moments})
        for number, parameter in enumerate(parameters):
            parameter.copy_(state[number]["master"])
            self._part_of[parameter].write(parameter)
        self.skipped_steps = state_dict.get("skipped_steps", 0)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]


def _moments(saved: dict[str, Any]) -> dict[str, Any]:
    """A copy, since torch would go on with the very tensors it is given."""
    return {"step": saved["step"], **{name: saved[name].clone() for name in ("exp_avg", "exp_avg_sq")}}


def _matrices(tensors: list[Tensor]) -> list[Tensor]:
    """Biases as matrices of one column, which the operator takes."""
    return [tensor[:, None] if tensor.dim() == 1 else tensor for tensor in tensors]


def _are_finite(values: Sequence[Tensor]) -> list[bool]:
    finite: list[bool] = torch.stack([value.to(values[0].device) for value in values]).isfinite().tolist()
    return finite


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _check_arguments(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not lr >= 0.0:
        raise ValueError(f"lr {lr} is below 0")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas {betas} are outside [0, 1)")
    if not eps >= 0.0:
        raise ValueError(f"eps {eps} is below 0")
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay {weight_decay} is below 0")
