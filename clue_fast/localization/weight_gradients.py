"""Gradients of the weights of every unit, reduced to a few numbers a unit.

Let z be the inputs of a linear module y = Wz + b and d = dL/dy, both over the tokens t of a record. The gradient of W
is sum_t d_t z_t. What is a mean over records of something that is squared needs no gradient matrix: the squared norm
of a unit's row is sum_tt' (d_t d_t') (z_t · z_t'), where one Gram matrix of the inputs serves all rows; of a column, z
and d change places. What compares the mean gradients of two sets weight by weight needs both as matrices.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.localization.owned import BIAS, COLUMNS, Owned, matrix, output_bias, owned_parts
from clue_fast.statistics import Statistics

SQUARE = "gradient_square"
PRODUCT = "weight_product"
MAGNITUDE = "gradient_magnitude"
OVERLAP = "gradient_overlap"

GRADIENT_BYTES = 8 * 2**30
"""Most memory that the mean gradients of both sets take at once; beyond it, there are further passes."""


class _BackwardRecorder:
    """Sees the inputs and the output gradients of linear modules in every backward pass, while it is entered.

    Set ``groups``, int64 [records], before each forward pass: the group of each row of the batch. Each record must
    add its own target to what is differentiated.

    Args:
        model: its modules are hooked, nothing is replaced.
        parts: what units own of them.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Owned]) -> None:
        self.groups = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._model = model
        self._by_module: dict[str, list[Owned]] = defaultdict(list)
        for owned in parts:
            self._by_module[owned.module].append(owned)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Any:
        for path in self._by_module:
            self._handles.append(self._model.get_submodule(path).register_forward_hook(self._hook(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _add(self, path: str, z: Tensor, d: Tensor, groups: Tensor) -> None:
        """Takes z [records, tokens, inputs] and d [records, tokens, outputs], in float32 or float64."""
        raise NotImplementedError

    def _hook(self, path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            z, groups = arguments[0].detach(), self.groups

            @torch.no_grad()
            def add(d: Tensor) -> None:
                self._add(path, _records(z, groups), _records(d, groups), groups)

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook


class SquaredGradientRecorder(_BackwardRecorder):
    """Adds ``gradient_square``, |g|² with g the gradient of all weights of a unit for one record, to statistics.

    No gradient of a weight matrix is ever formed.

    Args:
        model: see ``_BackwardRecorder``.
        statistics: of the model; updated in place.

    Raises:
        SiteError: the weights of a unit lie in no linear module.
    """

    def __init__(self, model: nn.Module, statistics: Statistics) -> None:
        super().__init__(model, owned_parts(model, statistics))
        self.statistics = statistics
        self._squares: dict[int, Tensor] = {}
        self._arrived: Counter[int] = Counter()
        statistics.allocate_record_sums(SQUARE)

    def count_records(self) -> None:
        """Counts the records of the last batch; call it once a batch."""
        counts = torch.bincount(self.groups, minlength=len(self.statistics.groups) + 1)
        self.statistics.records += counts[1:].to(self.statistics.records.device)

    def _add(self, path: str, z: Tensor, d: Tensor, groups: Tensor) -> None:
        z_gram = d_gram = None
        for owned in self._by_module[path]:
            if owned.side == BIAS:
                square = owned.take(d).sum(1).square()
            elif owned.side == COLUMNS:
                d_gram = d @ d.mT if d_gram is None else d_gram
                square = _quadratic(d_gram, owned.take(z))
            else:
                z_gram = z @ z.mT if z_gram is None else z_gram
                square = _quadratic(z_gram, owned.take(d))
            self._add_square(owned, owned.per_unit(square), groups)

    def _add_square(self, owned: Owned, square: Tensor, groups: Tensor) -> None:
        """Collects |g|² of all parts of a unit; once they are there, adds it."""
        self._squares[owned.site] = self._squares.get(owned.site, 0.0) + square.double().clamp_min(0.0)
        self._arrived[owned.site] += 1
        if self._arrived[owned.site] == len(self.statistics.sites[owned.site].parts):
            total = self._squares.pop(owned.site)
            del self._arrived[owned.site]
            self.statistics.add_records(SQUARE, owned.units, total, groups)


class MeanGradientRecorder(_BackwardRecorder):
    """At the end adds what the mean gradients ḡ over the records of each group are, to statistics.

    Per unit, summed over its weights w_i: ``weight_product`` w_i ḡ_i, ``gradient_magnitude`` |ḡ_i| and
    ``gradient_overlap`` ḡ_i ḡ_forget,i. They are added once for each record, so that their mean over the records is
    the number itself, and merged statistics hold the mean of the recordings.

    The gradients are held as matrices in float32, one a group: see ``mean_gradient_recorders`` for how much that is.

    Args:
        model: see ``_BackwardRecorder``.
        statistics: of the model, with all records counted; updated when this ends.
        parts: of the units of the statistics.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, parts: Sequence[Owned]) -> None:
        super().__init__(model, parts)
        self.statistics = statistics
        self._gradients: dict[str, Tensor] = {}
        self._bias_gradients: dict[str, Tensor] = {}
        statistics.allocate_record_sums(PRODUCT, MAGNITUDE, OVERLAP)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        super().__exit__(kind, *error)
        if kind is None:
            self._reduce()
        self._gradients.clear()
        self._bias_gradients.clear()

    def _add(self, path: str, z: Tensor, d: Tensor, groups: Tensor) -> None:
        rows = len(self.statistics.groups)
        if path not in self._gradients:
            self._gradients[path] = z.new_zeros(rows, d.shape[-1], z.shape[-1])
            self._bias_gradients[path] = z.new_zeros(rows, d.shape[-1])
        for row in range(rows):
            members = (groups == row + 1).to(d.device)
            of_row = d[members].flatten(0, 1)
            self._gradients[path][row].addmm_(of_row.T, z[members].flatten(0, 1))
            self._bias_gradients[path][row] += of_row.sum(0)

    @torch.no_grad()
    def _reduce(self) -> None:
        records = self.statistics.records
        for path, gradients in self._gradients.items():
            module = self._model.get_submodule(path)
            weight, bias = matrix(module).detach(), output_bias(module)
            counts = records.clamp_min(1).to(gradients)
            means = gradients.div_(counts[:, None, None])
            bias_means = (self._bias_gradients[path] / counts[:, None])[..., None]
            for owned in self._by_module[path]:
                if owned.side == BIAS:
                    assert bias is not None
                    self._add_sums(owned, bias.detach()[:, None], bias_means)
                else:
                    self._add_sums(owned, weight, means)

    def _add_sums(self, owned: Owned, weight: Tensor, means: Tensor) -> None:
        """Takes the weight that a unit owns slices of, and the mean gradients of each group, [groups, *weight]."""
        dim = 0 if owned.side == COLUMNS else 1
        for row, mean in enumerate(means):
            for name, terms in (
                (PRODUCT, weight.to(mean.dtype) * mean),
                (MAGNITUDE, mean.abs()),
                (OVERLAP, mean * means[0]),
            ):
                sums = self.statistics.record_sums[name]
                of_units = owned.per_unit(owned.take(terms.sum(dim, dtype=torch.float64)))
                sums[row, owned.units] += of_units.to(sums.device) * self.statistics.records[row]


def mean_gradient_recorders(
    model: nn.Module, statistics: Statistics, most: int = GRADIENT_BYTES
) -> Iterator[MeanGradientRecorder]:
    """Yields recorders that together see every unit; each needs a pass over all records.

    The gradients of a weight take 4 bytes a group (8 in float64), as long as its recorder is entered. There are as
    few recorders as keep them below ``most`` bytes, one for all where they fit; a module is never split.

    Raises:
        SiteError: the weights of a unit lie in no linear module.
    """
    chunk: list[Owned] = []
    size = 0
    modules: dict[str, list[Owned]] = defaultdict(list)
    for owned in owned_parts(model, statistics):
        modules[owned.module].append(owned)
    for path, parts in modules.items():
        weight = matrix(model.get_submodule(path))
        of_module = len(statistics.groups) * weight.numel() * (8 if weight.dtype == torch.float64 else 4)
        if chunk and size + of_module > most:
            yield MeanGradientRecorder(model, statistics, chunk)
            chunk, size = [], 0
        chunk += parts
        size += of_module
    yield MeanGradientRecorder(model, statistics, chunk)


def _records(x: Tensor, groups: Tensor) -> Tensor:
    """Returns x as [records, tokens, features], in float32 or float64; some models flatten the first two."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.reshape(len(groups), -1, x.shape[-1])


def _quadratic(gram: Tensor, own: Tensor) -> Tensor:
    """The sum over t, t' of own_t own_t' gram_tt', [records, features], from gram [records, tokens, tokens]."""
    return ((gram @ own) * own).sum(1)
