"""Gradients of the weights of every unit, reduced to a few numbers a unit inside the backward pass.

No gradient of a weight matrix is ever formed. Let a unit own a row of y = Wz; the gradient of that row is
sum_t d_t z_t with d = dL/dy, over the tokens t of a record. Then, for each record,

- its squared norm is sum_tt' (d_t d_t') (z_t · z_t'): one Gram matrix of the inputs, [tokens, tokens], serves all rows;
- its product with the row itself is sum_t d_t y_t, since y = Wz.

For a column of W, the inputs z of the unit and the gradients d of all outputs change places: the squared norm is
sum_tt' (z_t z_t') (d_t · d_t'), and the product sum_t z_t dL/dz_t, the a·dL/da of the unit.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.localization.owned import BIAS, COLUMNS, Owned, matrix, output_bias, owned_parts
from clue_fast.statistics import Statistics

SQUARE = "gradient_square"
NORM = "gradient_norm"
PRODUCT = "weight_product"


def direction(number: int) -> str:
    """Name of the sum of the gradients along the unit's weight vector of that part, as a unit vector."""
    return f"gradient_direction.{number}"


class WeightGradientRecorder:
    """Adds sums over records to statistics, while it is entered, in every backward pass.

    Per unit, with g the gradient of all weights of the unit for one record, g_k and w_k those of its k-th part:
    ``gradient_square`` |g|², ``gradient_norm`` |g|, ``weight_product`` w·g and ``gradient_direction.k`` w_k·g_k/|w_k|.

    Set ``groups``, int64 [records], before each forward pass: the group of each row of the batch. Each record must
    add its own target to what is differentiated.

    Args:
        model: its modules are hooked, nothing is replaced.
        statistics: of the model; updated in place.

    Raises:
        SiteError: the weights of a unit lie in no linear module.
    """

    def __init__(self, model: nn.Module, statistics: Statistics) -> None:
        self.statistics = statistics
        self.groups = torch.zeros(0, dtype=torch.int64)
        self._model = model
        self._by_module: dict[str, list[Owned]] = defaultdict(list)
        for owned in owned_parts(model, statistics):
            self._by_module[owned.module].append(owned)
        self._parts = [site.parts for site in statistics.sites]
        self._norms = {owned: self._weight_norm(owned) for parts in self._by_module.values() for owned in parts}
        self._squares: dict[int, Tensor] = {}
        self._arrived: Counter[int] = Counter()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        most = max(len(parts) for parts in self._parts)
        self._directions = [direction(number) for number in range(most)]
        statistics.allocate_record_sums(SQUARE, NORM, PRODUCT, *self._directions)

    def __enter__(self) -> WeightGradientRecorder:
        for path, parts in self._by_module.items():
            module = self._model.get_submodule(path)
            if any(owned.side == COLUMNS for owned in parts):
                self._handles.append(module.register_forward_pre_hook(self._alias_hook(parts)))
            self._handles.append(module.register_forward_hook(self._forward_hook(parts, module)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def count_records(self) -> None:
        """Counts the records of the last batch; call it once a batch."""
        counts = torch.bincount(self.groups, minlength=len(self.statistics.groups) + 1)
        self.statistics.records += counts[1:].to(self.statistics.records.device)

    def _alias_hook(self, parts: list[Owned]) -> Any:
        """Gives the module an input of its own, whose gradient is that of this module alone."""

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if not arguments[0].requires_grad:
                return None
            z = arguments[0].view_as(arguments[0])
            groups = self.groups

            def add(grad: Tensor) -> None:
                for owned in parts:
                    if owned.side == COLUMNS:
                        self._add_product(owned, _wide(owned.take(z.detach())) * _wide(owned.take(grad)), groups)

            z.register_hook(add)  # type: ignore[no-untyped-call]
            return (z, *arguments[1:])

        return hook

    def _forward_hook(self, parts: list[Owned], module: nn.Module) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            z, y, bias, groups = arguments[0].detach(), output.detach(), output_bias(module), self.groups
            if bias is not None:
                y = y - bias.detach()

            def add(grad: Tensor) -> None:
                self._add(parts, _records(z, groups), _records(y, groups), _records(grad, groups), bias, groups)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    @torch.no_grad()
    def _add(self, parts: list[Owned], z: Tensor, y: Tensor, grad: Tensor, bias: Tensor | None, groups: Tensor) -> None:
        z_gram = d_gram = None
        for owned in parts:
            if owned.side == BIAS:
                total = owned.take(grad).sum(1)
                square = total.square()
                assert bias is not None
                self._add_product(owned, (owned.take(_wide(bias.detach())) * total)[:, None], groups)
            elif owned.side == COLUMNS:
                d_gram = grad @ grad.mT if d_gram is None else d_gram
                square = _quadratic(d_gram, owned.take(z))
            else:
                z_gram = z @ z.mT if z_gram is None else z_gram
                square = _quadratic(z_gram, owned.take(grad))
                self._add_product(owned, owned.take(y) * owned.take(grad), groups)
            self._add_square(owned, owned.per_unit(square), groups)

    def _add_product(self, owned: Owned, product: Tensor, groups: Tensor) -> None:
        """Adds sum_t w·g, from [records, tokens, slices]."""
        per_record = owned.per_unit(_records(product, groups).double().sum(1))
        norm = self._norms[owned].to(per_record.device)
        for name, values in ((PRODUCT, per_record), (self._directions[owned.number], per_record / norm)):
            self._add_by_group(name, owned.units, values, groups)

    def _add_square(self, owned: Owned, square: Tensor, groups: Tensor) -> None:
        """Collects |g|² of all parts of a unit; once they are there, adds it and its root."""
        self._squares[owned.site] = self._squares.get(owned.site, 0.0) + square.double().clamp_min(0.0)
        self._arrived[owned.site] += 1
        if self._arrived[owned.site] == len(self._parts[owned.site]):
            total = self._squares.pop(owned.site)
            del self._arrived[owned.site]
            self._add_by_group(SQUARE, owned.units, total, groups)
            self._add_by_group(NORM, owned.units, total.sqrt(), groups)

    def _add_by_group(self, name: str, units: slice, values: Tensor, groups: Tensor) -> None:
        sums = self.statistics.record_sums[name]
        for row in range(len(self.statistics.groups)):
            sums[row, units] += values[(groups == row + 1).to(values.device)].sum(0).to(sums.device)

    def _weight_norm(self, owned: Owned) -> Tensor:
        """|w_k| of each unit, [width] float64, above zero."""
        module = self._model.get_submodule(owned.module)
        if owned.side == BIAS:
            bias = output_bias(module)
            assert bias is not None
            squares = bias.detach().double().square()
        else:
            squares = matrix(module).detach().double().square().sum(0 if owned.side == COLUMNS else 1)
        return owned.per_unit(owned.take(squares)).sqrt().clamp_min(torch.finfo(torch.float64).tiny)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _records(x: Tensor, groups: Tensor) -> Tensor:
    """Returns x as [records, tokens, features], in float32 or float64; some models flatten the first two."""
    return _wide(x).reshape(len(groups), -1, x.shape[-1])


def _quadratic(gram: Tensor, own: Tensor) -> Tensor:
    """The sum over t, t' of own_t own_t' gram_tt', [records, features], from gram [records, tokens, tokens]."""
    return ((gram @ own) * own).sum(1)
