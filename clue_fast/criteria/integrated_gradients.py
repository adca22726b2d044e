"""Integrated gradients of every unit, as the knowledge neurons of Dai et al. 2022 (arXiv 2104.08696) are found."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.criteria.weight_gradients import ModuleSlice, input_slices, module_slices
from clue_fast.errors import SiteError
from clue_fast.statistics import Statistics

INTEGRATED = "integrated_gradient"
STEPS = 20


class IntegratedGradients:
    """Adds ``integrated_gradient``, a sum over records, to statistics.

    attr_u = a_u / m · sum_k=1..m  dP(k/m · a)/da_u, where a are the activations of one site at the tokens that predict
    an answer token, scaled together from 0 to their value while all else stays, and P is the probability of the
    answer, summed over its tokens: for an answer of one token, the formula of the paper. One forward and one backward
    pass a step and layer; the backward ends at the layer.

    Args:
        model: its modules are hooked, nothing is replaced.
        statistics: of the model; updated in place.
        steps: m.

    Raises:
        SiteError: the activations of a unit enter no linear module.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, steps: int = STEPS) -> None:
        self.statistics, self.steps = statistics, steps
        self._model = model
        self._by_module: dict[str, list[ModuleSlice]] = defaultdict(list)
        for owned in input_slices(module_slices(model, statistics)):
            self._by_module[owned.module].append(owned)
        missing = set(range(len(statistics.sites))) - {p.site for parts in self._by_module.values() for p in parts}
        if missing:
            raise SiteError(
                f"the activations of {statistics.sites[min(missing)].name} enter no linear module, so they have no "
                "integrated gradient; choose another criterion"
            )
        statistics.allocate_record_sums(INTEGRATED)

    def add(self, forward: Callable[[], Tensor], groups: Tensor, counted: Tensor) -> None:
        """Runs the model ``steps`` times per site on one batch.

        Args:
            forward: runs the model and returns P, one value that sums over the records.
            groups: int64 [records], the group of each.
            counted: bool [records, tokens], where units are measured, such as where an answer token is predicted.
        """
        for path, parts in self._by_module.items():
            gradient: Tensor | None = None
            for step in range(1, self.steps + 1):
                scaled = _Scaled(self._model.get_submodule(path), step / self.steps, counted)
                with scaled, torch.enable_grad():
                    torch.autograd.backward(forward())
                grad = scaled.leaf.grad
                assert grad is not None
                gradient = grad.double() if gradient is None else gradient + grad.double()
            assert gradient is not None
            product = scaled.activation.double() * gradient / self.steps * counted.reshape(-1)[:, None]
            for owned in parts:
                values = owned.per_unit(owned.take(product))
                self.statistics.add_records(
                    INTEGRATED, owned.units, values.reshape(len(groups), -1, owned.width).sum(1), groups
                )
        counts = torch.bincount(groups, minlength=len(self.statistics.groups) + 1)
        self.statistics.records += counts[1:].to(self.statistics.records.device)


class _Scaled:
    """Scales the input of a module at some tokens, while it is entered.

    Attributes:
        activation: the input as it was, [records * tokens, features].
        leaf: the scaled input, whose gradient is wanted.
    """

    activation: Tensor
    leaf: Tensor

    def __init__(self, module: nn.Module, factor: float, tokens: Tensor) -> None:
        self._module, self._factor, self._tokens = module, factor, tokens

    def __enter__(self) -> _Scaled:
        self._handle = self._module.register_forward_pre_hook(self._hook)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _hook(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Any, ...]:
        shape = arguments[0].shape
        self.activation = arguments[0].detach().reshape(-1, shape[-1])
        factor = torch.where(self._tokens.reshape(-1, 1), self._factor, 1.0).to(self.activation.dtype)
        self.leaf = (self.activation * factor).requires_grad_()
        return (self.leaf.reshape(shape), *arguments[1:])
