"""Optimizers of the selected weights, all layers in one launch: AdamW, and SGD with momentum.

First what both share (a parameter group per layer, values and rounding, checks, state), then the two rules.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.config import LAYER_LR
from clue_fast.deprecated import RenamedAttribute, precision, renamed_arguments
from clue_fast.errors import SettingError, SparseError
from clue_fast.internals import norms
from clue_fast.sparse.layer_rates import LayerRate, layer_scale
from clue_fast.sparse.shards import any_of_all
from clue_fast.sparse.slices import SHARD_AFTER, TrainableSlice, mark_changed, trainable_slices

logger = logging.getLogger(__name__)


class SparseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that write into the selected slices of the weights, all layers in one launch.

    There is one parameter group per layer, with the keys ``layer`` and ``layer_scale``, so that schedulers and
    loggers see every rate. State exists for what trains only.

    A step with a non-finite gradient changes nothing: it is logged with the weights concerned and counted in
    ``skipped_steps``.

    Args:
        model: after ``sparsify``.
        defaults: of the groups; "lr" is the rate of the first layer of the model.
        layer_lr: learning rate of the last layer over that of the first, geometric in between, or another rate by
            layer, see ``LayerRate``; 1 is the same rate for all.
        seed: of stochastic rounding.
        master_weights: keeps updates below the resolution of a 16-bit weight in a float32 copy of the selected
            weights, which the weights take over rounded to nearest even.
        stochastic_rounding: keeps no copy, and rounds a 16-bit weight up with the probability of the part that is cut
            off; that saves 4 bytes for every selected weight. Goes with ``master_weights=False``. Weights in float32
            need neither, and have neither: they are their own masters.

    Raises:
        SparseError: the model is not sparse.
        SettingError: both ways of keeping small updates, or none for 16-bit weights, see ``check_precision``.
        ValueError: an argument is out of range.
    """

    moments: ClassVar[tuple[str, ...]] = ()
    """Names of the float32 tensors kept for each slice, beside "step"."""

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
        by_layer = _slices_by_layer(model)
        check_precision(trainable_slices(model), master_weights, stochastic_rounding)
        self.skipped_steps = 0
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        groups = []
        for layer, slices in by_layer.items():
            scale = layer_scale(layer_lr, layer, slices[0].layers)
            parameters = [trained.values for trained in slices]
            groups.append({"params": parameters, "lr": defaults["lr"] * scale, "layer": layer, "layer_scale": scale})
        super().__init__(groups, defaults)
        self._take(by_layer)

    follow = RenamedAttribute("rebuild_param_groups")

    def rebuild_param_groups(self, model: nn.Module) -> None:
        """Trains what the model trains now, after ``Sparse.reselect``; rates go on, moments and steps start anew.

        Raises:
            SparseError: the selection has units in other layers than before; schedulers could not follow.
        """
        by_layer = _slices_by_layer(model)
        layers = [group["layer"] for group in self.param_groups]
        if list(by_layer) != layers:
            raise SparseError(
                f"units are selected in the layers {list(by_layer)} now, the rates are of {layers}; "
                'keep to the same layers, as scope="layer" does'
            )
        for group, slices in zip(self.param_groups, by_layer.values(), strict=True):
            group["params"] = [trained.values for trained in slices]
        self.state.clear()
        self._take(by_layer)

    def _take(self, by_layer: dict[int, list[TrainableSlice]]) -> None:
        self._slice_of = {trained.values: trained for slices in by_layer.values() for trained in slices}
        for number, trained in enumerate(self._slice_of.values()):
            trained.rounding_seed = (self.seed << 32) + number
            trained.keep_values(self.master_weights)

    def _launch(self, entries: list[tuple[TrainableSlice, dict[str, Any]]]) -> None:
        """Updates slices that share the settings of ``_settings``; their states have been advanced."""
        raise NotImplementedError

    def _settings(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What one launch takes one of; it only differs between groups if somebody edits them."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates values and weights. Parameters without a gradient are skipped.

        Raises:
            SparseError: no parameter has a gradient, the values are no longer float32, or the model holds
                its original weights at the moment.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updates = [
            (self._slice_of[p], group) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        self._check_updates([trained for trained, _ in updates])
        if self._has_finite_gradients([trained for trained, _ in updates]):
            launches: dict[Any, list[tuple[TrainableSlice, dict[str, Any]]]] = defaultdict(list)
            for trained, group in updates:
                self._advance(trained, group)
                if trained.values.numel():
                    alike = self._settings(group), trained.values.device, trained.has_values
                    launches[alike].append((trained, group))
            for entries in launches.values():
                self._launch(entries)
            mark_changed([trained for trained, _ in updates])
        return loss

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Which of the moments a group needs."""
        return self.moments

    def _advance(self, trained: TrainableSlice, group: dict[str, Any]) -> None:
        state = self.state[trained.values]
        for name in self._kept(group):
            if name not in state:
                state[name] = torch.zeros(trained.values.shape, device=trained.values.device)
        state["step"] = state.get("step", 0) + 1

    def _check_updates(self, slices: list[TrainableSlice]) -> None:
        if not slices:
            raise SparseError(
                "no selected weight has a gradient; call backward() first (reentrant gradient checkpointing "
                "drops them: set use_reentrant=False, or call model.enable_input_require_grads())"
            )
        whole = next((trained for trained in slices if trained.shard is None), None)
        for trained in slices:
            if trained.shard is not None and whole is not None:
                raise SparseError(f"{trained.path} is sharded and {whole.path} is not; shard the rest of the model too")
            if trained.swapped:
                raise SparseError(f"{trained.path} holds its original weights; step outside Sparse.original()")
            if getattr(trained.module, trained.values_name, None) is not trained.values:
                raise SparseError(
                    f"the master values of {trained.path} were replaced, as torch's fully_shard does; {SHARD_AFTER}"
                )
            if trained.values.dtype != torch.float32:
                raise SparseError(
                    f"the master values of {trained.path} are {trained.values.dtype}, they must stay float32; "
                    "cast the model before sparsify, not its parameters after"
                )
            state = self.state.get(trained.values, {})
            if any(state[name].shape != trained.values.shape for name in self.moments if name in state):
                raise SparseError(f"{trained.path} was sharded after a step; make the optimizer after fully_shard")

    def _has_finite_gradients(self, slices: list[TrainableSlice]) -> bool:
        finite = _are_finite([gradient(trained) for trained in slices])
        if (shard := slices[0].shard) is not None:  # all processes skip the step, or none
            finite = [not bad for bad in any_of_all([not ok for ok in finite], shard.group, shard.leaf.device)]
        bad = [trained.path for trained, ok in zip(slices, finite, strict=True) if not ok]
        if bad:
            self.skipped_steps += 1
            # Clipping by a norm that is not finite spoils every gradient; then the first name says little.
            where = "all of them" if len(bad) == len(slices) else ", ".join(bad[:4])
            logger.warning(
                "skipped a step, the %d. so far: gradient not finite in %s (%d of %d weights)",
                self.skipped_steps, where, len(bad), len(slices),
            )  # fmt: skip
        return not bad

    def _numbers(self, entries: list[tuple[TrainableSlice, dict[str, Any]]]) -> tuple[Tensor, Tensor, Tensor]:
        """Rate, weight decay and step of each, as operators take them."""
        return (
            torch.tensor([float(group["lr"]) for _, group in entries], dtype=torch.float64, device="cpu"),
            torch.tensor([float(group["weight_decay"]) for _, group in entries], dtype=torch.float64, device="cpu"),
            torch.tensor([self.state[one.values]["step"] for one, _ in entries], dtype=torch.int64, device="cpu"),
        )

    def _values(self, slices: list[TrainableSlice]) -> tuple[list[Tensor] | None, Tensor | None]:
        """Values, or the seeds of stochastic rounding in their place, or neither."""
        if slices[0].has_values:
            return as_2d(trained.values.detach() for trained in slices), None
        if not self.stochastic_rounding:
            return None, None
        # Random bits are counted from the first value of a slice, so processes that have parts of it take others.
        seeds = [one.rounding_seed + (one.shard.rank << 24 if one.shard else 0) for one in slices]
        return None, torch.tensor(seeds, dtype=torch.int64, device="cpu")

    def _moments(self, name: str, slices: list[TrainableSlice]) -> list[Tensor]:
        return as_2d(self.state[trained.values][name] for trained in slices)

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and also every ``values`` as "master", which a bfloat16 weight cannot hold, with its index.

        Where FSDP2 shards the model the state is gathered whole, to be loaded on any number of processes: every one of
        them has to call this, and to load.
        """
        saved = super().state_dict()
        state: dict[int, dict[str, Any]] = {}
        for number, trained in enumerate(self._slices()):
            own = saved["state"].get(number, {})
            master = trained.values.detach() if trained.has_values else trained.read()
            state[number] = {name: trained.gather(own[name]) if name in self.moments else own[name] for name in own}
            state[number] |= {"master": trained.gather(master), "index": trained.index}
        return {**saved, "state": state, "skipped_steps": self.skipped_steps, "seed": self.seed}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores moments, steps, learning rates and values, and writes the values into the weights.

        Raises:
            SparseError: the state belongs to another selection, or to another optimizer.
        """
        slices = self._slices()
        state = state_dict["state"]
        groups = {number: group for group in state_dict["param_groups"] for number in group["params"]}
        for number, trained in enumerate(slices):
            saved = state.get(number, {})
            fits = "master" in saved and saved["master"].shape == trained.leaf.shape
            if not fits or ("step" in saved and set(saved) != {"master", "index", "step", *self._kept(groups[number])}):
                raise SparseError(
                    f"the optimizer state does not fit {trained.path}; it is of another model or optimizer"
                )
            if not torch.equal(saved["index"].cpu(), trained.index.cpu()):
                raise SparseError(f"the optimizer state has other units of {trained.path}; load its own selection")
        # Copies, since torch would go on with the very tensors it is given.
        moments = {
            number: {
                "step": saved["step"],
                **{name: slices[number].own(saved[name]).clone() for name in self.moments if name in saved},
            }
            for number, saved in state.items()
            if "step" in saved
        }
        super().load_state_dict({**state_dict, "state": moments})
        self.seed = state_dict.get("seed", self.seed)
        for number, trained in enumerate(slices):
            trained.set_values(trained.own(state[number]["master"]).to(trained.values.device))
            trained.rounding_seed = (self.seed << 32) + number
        self.skipped_steps = state_dict.get("skipped_steps", 0)

    def _slices(self) -> list[TrainableSlice]:
        return [self._slice_of[p] for group in self.param_groups for p in group["params"]]


def _slices_by_layer(model: nn.Module) -> dict[int, list[TrainableSlice]]:
    by_layer: dict[int, list[TrainableSlice]] = defaultdict(list)
    for trained in trainable_slices(model):
        by_layer[trained.layer].append(trained)
    if not by_layer:
        raise SparseError("the model trains no selected weights; call clue_fast.sparsify(model, selection) first")
    return dict(sorted(by_layer.items()))


def check_precision(slices: Iterable[TrainableSlice], master_weights: bool, stochastic_rounding: bool) -> None:
    """Raises SettingError unless updates below the resolution of a 16-bit weight are kept, in one way."""
    if master_weights and stochastic_rounding:
        raise SettingError(
            "master_weights and stochastic_rounding exclude each other: with a float32 copy of the selected weights no "
            "update is lost; set master_weights=False to round stochastically"
        )
    if master_weights or stochastic_rounding:
        return
    for trained in slices:
        if trained.weight.dtype != torch.float32:
            raise SettingError(
                f"{trained.path} is {trained.weight.dtype}, which drops small updates; set master_weights or "
                "stochastic_rounding"
            )


def gradient(trained: TrainableSlice) -> Tensor:
    """Returns the gradient of slices, which have one."""
    assert trained.values.grad is not None
    return trained.values.grad


def as_2d(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Returns biases as matrices of one column, which the operators take, and matrices as they are."""
    return [tensor[:, None] if tensor.dim() == 1 else tensor for tensor in tensors]


def _are_finite(gradients: Sequence[Tensor]) -> list[bool]:
    finite = [True] * len(gradients)
    places = [place for place, found in enumerate(gradients) if found.numel()]
    # The maximum norm takes 18 times as long on a CPU; only the other overflows for finite gradients.
    for order in (2.0, float("inf")):
        if not places:
            break
        found = norms([gradients[place] for place in places], order)
        flags = torch.stack([norm.to(found[0].device) for norm in found]).isfinite().tolist()
        for place, flag in zip(places, flags, strict=True):
            finite[place] = flag
        if all(flags):
            break
    return finite


def check_not_below_zero(values: dict[str, Any], names: Iterable[str]) -> None:
    """Raises ValueError unless all of these are numbers from 0 on."""
    for name in names:
        if not values[name] >= 0.0:
            raise ValueError(f"{name} {values[name]} is below 0")


class SparseAdamW(SparseOptimizer):
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) on what trains in a sparse model.

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
        layer_lr: LayerRate = LAYER_LR,
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

    def _launch(self, entries: list[tuple[TrainableSlice, dict[str, Any]]]) -> None:
        slices = [trained for trained, _ in entries]
        group = entries[0][1]
        values, seeds = self._values(slices)
        ops.sparse_adamw_(
            values,
            as_2d(gradient(trained) for trained in slices),
            self._moments("exp_avg", slices),
            self._moments("exp_avg_sq", slices),
            as_2d(trained.weight for trained in slices),
            [trained.weight_index for trained in slices],
            [trained.dim for trained in slices],
            *self._numbers(entries),
            group["betas"],
            group["eps"],
            seed=seeds,
        )


class SparseSGD(SparseOptimizer):
    """SGD with momentum (Sutskever et al. 2013) on what trains in a sparse model, as ``torch.optim.SGD``.

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
        layer_lr: LayerRate = LAYER_LR,
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

    def _launch(self, entries: list[tuple[TrainableSlice, dict[str, Any]]]) -> None:
        slices = [trained for trained, _ in entries]
        momentum = entries[0][1]["momentum"]
        values, seeds = self._values(slices)
        ops.sparse_sgd_(
            values,
            as_2d(gradient(trained) for trained in slices),
            self._moments("momentum_buffer", slices) if momentum else None,
            as_2d(trained.weight for trained in slices),
            [trained.weight_index for trained in slices],
            [trained.dim for trained in slices],
            *self._numbers(entries),
            momentum,
            seed=seeds,
        )
