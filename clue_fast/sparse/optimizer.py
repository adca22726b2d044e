"""Learning rates by layer: what share of the first layer's rate every other layer trains at.

What the optimizers of selected weights share: groups by layer, masters, checks, and their state.

AdamW on the selected weights.

Stochastic gradient descent on the selected weights.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import SettingError, SparseError
from clue_fast.sparse.slices import DDP, TrainedPart, trained_parts

logger = logging.getLogger(__name__)

LayerRate: TypeAlias = "float | Mapping[int, float] | Callable[[int, int], float]"
"""The rate of layer l of L over that of the first. A number is the ratio of the last layer to the first,
geometric in between: ``ratio ** (l / (L - 1))``, so that it means the same at any depth; 1 is uniform, above 1
the rate rises. A mapping names every layer that trains. A function is called with l and L."""


@dataclass(frozen=True)
class LinearLayerRate:
    """A rate that falls (or rises) by the same amount from layer to layer: ``1 + (ratio - 1) * l / (L - 1)``.

    Attributes:
        ratio: the rate of the last layer over that of the first; at least 0.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.ratio < math.inf:
            raise ValueError(f"ratio {self.ratio} of a linear layer_lr is not a number from 0 on")

    def __call__(self, layer: int, layers: int) -> float:
        """Returns the rate of a layer over that of the first."""
        return 1.0 + (self.ratio - 1.0) * _depth(layer, layers)


def layer_scale(layer_lr: LayerRate, layer: int, layers: int) -> float:
    """Returns the rate of a layer over that of the first.

    Args:
        layer_lr: see ``LayerRate``.
        layer: index of the layer, from 0.
        layers: how many layers the model has.

    Raises:
        ValueError: a ratio is not above 0, a mapping lacks the layer or names one that does not exist, or the
            result is negative, infinite or NaN.
    """
    if callable(layer_lr):
        scale = float(layer_lr(layer, layers))
    elif isinstance(layer_lr, Mapping):
        scale = _mapped(layer_lr, layer, layers)
    else:
        if not 0.0 < layer_lr < math.inf:
            raise ValueError(f"layer_lr {layer_lr} is not above 0")
        scale = layer_lr ** _depth(layer, layers)
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"layer_lr gives layer {layer} the scale {scale}; give it a number from 0 on")
    return scale


def _mapped(layer_lr: Mapping[int, float], layer: int, layers: int) -> float:
    if unknown := sorted(set(layer_lr) - set(range(layers))):
        raise ValueError(f"layer_lr names layer {unknown[0]}, the model has layers 0 to {layers - 1}")
    if layer not in layer_lr:
        raise ValueError(f"layer_lr says nothing of layer {layer}, which has units to train; add it, or 0 to freeze it")
    return float(layer_lr[layer])


def _depth(layer: int, layers: int) -> float:
    return layer / max(1, layers - 1)


class SparseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that write into the selected slices of the weights, all layers in one launch.

    There is one parameter group a layer, with the keys ``layer`` and ``layer_scale``, so that schedulers and
    loggers see every rate. State exists for the trained part only.

    A step with a non-finite gradient changes nothing: it is logged with the weights concerned and counted in
    ``skipped_steps``.

    Args:
        model: after ``sparsify``.
        defaults: of the groups; "lr" is the rate of the first layer of the model.
        layer_lr: learning rate of the last layer over that of the first, geometric in between, or another rate by
            layer, see ``LayerRate``.
        seed: of stochastic rounding.
        master_weights: keeps updates below the resolution of a 16-bit weight in a float32 copy of the selected
            weights, which the weights take over rounded to nearest even.
        stochastic_rounding: keeps no copy, and rounds a 16-bit weight up with the probability of the part that is cut
            off; that saves 4 bytes for every selected weight. Goes with ``master_weights=False``; weights in float32
            need neither.

    Raises:
        SparseError: the model is not sparse.
        SettingError: both ways of keeping small updates, or none for 16-bit weights, see ``check_precision``.
        ValueError: an argument is out of range.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    """Names of the float32 tensors kept for each part, beside "step"."""

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        layer_lr: LayerRate,
        seed: int = 0,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        check_not_below_zero(defaults, ("lr", "weight_decay"))
        by_layer = _parts_by_layer(model)
        check_precision(trained_parts(model), master_weights, stochastic_rounding)
        self.skipped_steps = 0
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        groups = []
        for layer, parts in by_layer.items():
            scale = layer_scale(layer_lr, layer, parts[0].layers)
            parameters = [part.selected for part in parts]
            groups.append({"params": parameters, "lr": defaults["lr"] * scale, "layer": layer, "layer_scale": scale})
        super().__init__(groups, defaults)
        self._take(by_layer)

    def follow(self, model: nn.Module) -> None:
        """Trains what the model trains now, after ``Sparse.reselect``; rates go on, moments and steps start anew.

        Raises:
            SparseError: the selection has units in other layers than before; schedulers could not follow.
        """
        by_layer = _parts_by_layer(model)
        layers = [group["layer"] for group in self.param_groups]
        if list(by_layer) != layers:
            raise SparseError(
                f"units are selected in the layers {list(by_layer)} now, the rates are of {layers}; "
                'keep to the same layers, as scope="layer" does'
            )
        for group, parts in zip(self.param_groups, by_layer.values(), strict=True):
            group["params"] = [part.selected for part in parts]
        self.state.clear()
        self._take(by_layer)

    def _take(self, by_layer: dict[int, list[TrainedPart]]) -> None:
        self._part_of = {part.selected: part for parts in by_layer.values() for part in parts}
        for number, part in enumerate(self._part_of.values()):
            part.rounding_seed = (self.seed << 32) + number
            part.keep_master(self.master_weights)

    def _launch(self, entries: list[tuple[TrainedPart, dict[str, Any]]]) -> None:
        """Updates parts that share the settings of ``_settings``; their states have been advanced."""
        raise NotImplementedError

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What one launch takes one of; it only differs between groups if somebody edits them."""
        raise NotImplementedError

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
        updates = [
            (self._part_of[p], group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        self._check_updates([part for part, _ in updates])
        if self._has_finite_gradients([part for part, _ in updates]):
            launches: dict[Any, list[tuple[TrainedPart, dict[str, Any]]]] = defaultdict(list)
            for part, group in updates:
                self._advance(part, group)
                launches[self._settings(group), part.selected.device].append((part, group))
            for entries in launches.values():
                self._launch(entries)
            # A forward from before this step must not be run backward with the weights from after it.
            torch.autograd.graph.increment_version([getattr(part.module, part.name) for part, _ in updates])
        return loss

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Which of the moments a group needs."""
        return self.moments

    def _advance(self, part: TrainedPart, group: dict[str, Any]) -> None:
        state = self.state[part.selected]
        for name in self._kept(group):
            if name not in state:
                state[name] = torch.zeros(part.selected.shape, device=part.selected.device)
        state["step"] = state.get("step", 0) + 1

    def _check_updates(self, parts: list[TrainedPart]) -> None:
        if not parts:
            raise SparseError(
                "no selected weight has a gradient; call backward() first (reentrant gradient checkpointing "
                "drops them: set use_reentrant=False, or call model.enable_input_require_grads())"
            )
        for part in parts:
            if part.swapped:
                raise SparseError(f"{part.path} holds its original weights; step outside Sparse.original()")
            if getattr(part.module, part.master_name, None) is not part.selected:
                raise SparseError(f"the master values of {part.path} were replaced, as FSDP does; leave it out, {DDP}")
            if part.selected.dtype != torch.float32:
                raise SparseError(
                    f"the master values of {part.path} are {part.selected.dtype}, they must stay float32; "
                    "cast the model before sparsify, not its parameters after"
                )

    def _has_finite_gradients(self, parts: list[TrainedPart]) -> bool:
        gradients = [gradient(part) for part in parts]
        # The maximum norm takes 18 times as long on a CPU; only the other overflows for finite gradients.
        finite = _are_finite(torch._foreach_norm(gradients))
        if not all(finite):
            finite = _are_finite(torch._foreach_norm(gradients, float("inf")))
        bad = [part.path for part, ok in zip(parts, finite, strict=True) if not ok]
        if bad:
            self.skipped_steps += 1
            # Clipping by a norm that is not finite spoils every gradient; then the first name says little.
            where = "all of them" if len(bad) == len(parts) else ", ".join(bad[:4])
            logger.warning(
                "skipped a step, the %d. so far: gradient not finite in %s (%d of %d weights)",
                self.skipped_steps, where, len(bad), len(parts),
            )  # fmt: skip
        return not bad

    def _numbers(self, entries: list[tuple[TrainedPart, dict[str, Any]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, weight decay and step of each part, as operators take them."""
        return (
            torch.tensor([float(group["lr"]) for _, group in entries], dtype=torch.float64, device="cpu"),
            torch.tensor([float(group["weight_decay"]) for _, group in entries], dtype=torch.float64, device="cpu"),
            torch.tensor([self.state[part.selected]["step"] for part, _ in entries], dtype=torch.int64, device="cpu"),
        )

    def _masters(self, parts: list[TrainedPart]) -> tuple[list[Tensor] | None, Tensor | None]:
        """Master values, or the seeds of stochastic rounding in their place, or neither."""
        if self.master_weights:
            return matrices(part.selected.detach() for part in parts), None
        if not self.stochastic_rounding:
            return None, None
        return None, torch.tensor([part.rounding_seed for part in parts], dtype=torch.int64, device="cpu")

    def _moments(self, name: str, parts: list[TrainedPart]) -> list[Tensor]:
        return matrices(self.state[part.selected][name] for part in parts)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and also every ``master``, which a bfloat16 weight cannot hold, with its ``index``."""
        saved = super().state_dict()
        state = {
            number: {
                **saved["state"].get(number, {}),
                "master": part.selected.detach() if self.master_weights else part.read(),
                "index": part.index,
            }
            for number, part in enumerate(self._parts())
        }
        return {**saved, "state": state, "skipped_steps": self.skipped_steps, "seed": self.seed}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores moments, steps, learning rates and masters, and writes the masters into the weights.

        Raises:
            SparseError: the state belongs to another selection, or to another optimizer.
        """
        parts = self._parts()
        state = state_dict["state"]
        groups = {number: group for group in state_dict["param_groups"] for number in group["params"]}
        for number, part in enumerate(parts):
            saved = state.get(number, {})
            fits = "master" in saved and saved["master"].shape == part.selected.shape
            if not fits or ("step" in saved and set(saved) != {"master", "index", "step", *self._kept(groups[number])}):
                raise SparseError(f"the optimizer state does not fit {part.path}; it is of another model or optimizer")
            if not torch.equal(saved["index"].cpu(), part.index.cpu()):
                raise SparseError(f"the optimizer state has other units of {part.path}; load its own selection")
        # Copies, since torch would go on with the very tensors it is given.
        moments = {
            number: {"step": saved["step"], **{name: saved[name].clone() for name in self.moments if name in saved}}
            for number, saved in state.items()
            if "step" in saved
        }
        super().load_state_dict({**state_dict, "state": moments})
        self.seed = state_dict.get("seed", self.seed)
        for number, part in enumerate(parts):
            part.set_values(state[number]["master"].to(part.selected.device))
            part.rounding_seed = (self.seed << 32) + number
        self.skipped_steps = state_dict.get("skipped_steps", 0)

    def _parts(self) -> list[TrainedPart]:
        return [self._part_of[p] for group in self.param_groups for p in group["params"]]


def _parts_by_layer(model: nn.Module) -> dict[int, list[TrainedPart]]:
    by_layer: dict[int, list[TrainedPart]] = defaultdict(list)
    for part in trained_parts(model):
        by_layer[part.layer].append(part)
    if not by_layer:
        raise SparseError("the model trains no selected weights; call clue_fast.sparsify(model, selection) first")
    return dict(sorted(by_layer.items()))


def check_precision(parts: Iterable[TrainedPart], master_weights: bool, stochastic_rounding: bool) -> None:
    """Raises SettingError unless updates below the resolution of a 16-bit weight are kept, in one way."""
    if master_weights and stochastic_rounding:
        raise SettingError(
            "master_weights and stochastic_rounding exclude each other: with a float32 copy of the selected weights no "
            "update is lost; set master_weights=False to round stochastically"
        )
    if master_weights or stochastic_rounding:
        return
    for part in parts:
        if part.weight.dtype != torch.float32:
            raise SettingError(
                f"{part.path} is {part.weight.dtype}, which drops small updates; set master_weights or "
                "stochastic_rounding"
            )


def gradient(part: TrainedPart) -> Tensor:
    """Returns the gradient of a part, which has one."""
    assert part.selected.grad is not None
    return part.selected.grad


def matrices(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns biases as matrices of one column, which the operators take, and matrices as they are."""
    return [tensor[:, None] if tensor.dim() == 1 else tensor for tensor in tensors]


def _are_finite(values: Sequence[Tensor]) -> list[bool]:
    finite: list[bool] = torch.stack([value.to(values[0].device) for value in values]).isfinite().tolist()
    return finite


def check_not_below_zero(values: dict[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError unless all of these are numbers from 0 on."""
    for name in names:
        if not values[name] >= 0.0:
            raise ValueError(f"{name} {values[name]} is below 0")


class SparseAdamW(SparseOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on the trained part of a sparse model.

    The update of a master value is that of ``torch.optim.AdamW``. See ``SparseOptimizer`` for the rest.

    Args:
        model: after ``sparsify``.
        lr: learning rate of the first layer of the model.
        betas, eps: as in Adam.
        weight_decay: decoupled, applied to selected weights only.
        layer_lr, seed, master_weights, stochastic_rounding: see ``SparseOptimizer``.

    Raises:
        SparseError: the model is not sparse.
        SettingError: see ``check_precision``.
        ValueError: an argument is out of range.
    """

    moments: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    @renamed_arguments(master=precision)
    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        layer_lr: LayerRate = 1.0,
        *,
        seed: int = 0,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas {betas} are outside [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_not_below_zero(defaults, ("eps",))
        super().__init__(model, defaults, layer_lr, seed, master_weights, stochastic_rounding)

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


class SparseSGD(SparseOptimizer):
    """SGD with momentum (Sutskever et al. 2013) on the trained part of a sparse model, as ``torch.optim.SGD``.

    See ``SparseOptimizer`` for what it shares with ``SparseAdamW``.

    Args:
        model: after ``sparsify``.
        lr: learning rate of the first layer of the model.
        momentum: how much of the last direction is kept; at 0 there is no state but the count of steps.
        weight_decay: added to the gradient, times the weight; selected weights only.
        layer_lr, seed, master_weights, stochastic_rounding: see ``SparseOptimizer``.

    Raises:
        SparseError: the model is not sparse.
        SettingError: see ``check_precision``.
        ValueError: an argument is out of range.
    """

    moments: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    @renamed_arguments(master=precision)
    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        layer_lr: LayerRate = 1.0,
        *,
        seed: int = 0,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        check_not_below_zero(defaults, ("momentum",))
        super().__init__(model, defaults, layer_lr, seed, master_weights, stochastic_rounding)

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
