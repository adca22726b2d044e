"""Weights of every unit with their gradients or inputs, reduced to a few numbers per unit.

``module_slices`` binds what a unit has of the parameters to the linear modules y = Wz + b that hold them. Let z and
d = dL/dy be those of the tokens t of a record. The gradient of W is sum_t d_t z_t. What is a mean over records of
something that is squared needs no gradient matrix: the squared norm of a unit's row is sum_tt' (d_t d_t') (z_t · z_t'),
where one Gram matrix of the inputs serves all rows; of a column, z and d change places. What compares the mean
gradients of two sets weight by weight needs both as matrices. The size of inputs times weights needs forward passes
alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.errors import SiteError
from clue_fast.ops.accumulators import wide
from clue_fast.sites import ParamSlice, Site
from clue_fast.sites.projection import is_linear, output_bias, projection_of, weight_matrix
from clue_fast.statistics import Statistics

ROWS, COLUMNS, BIAS = "rows", "columns", "bias"
WEIGHTED_INPUT = "weighted_input"
SQUARE = "gradient_square"
PRODUCT = "weight_product"
MAGNITUDE = "gradient_magnitude"
OVERLAP = "gradient_overlap"

GRADIENT_BYTES = 8 * 2**30
"""Most memory that the mean gradients of both sets take at once; beyond it, there are further passes."""


@dataclass(frozen=True, eq=False)
class ModuleSlice:
    """One slice of the units of a site, bound to the linear module y = Wz + b that holds it.

    A ``ParamSlice`` says where units lie in a parameter of any layout, and this which inputs or outputs of a module are
    theirs, whatever the layout: what is measured are the module's tokens, and the parameter is not indexed.

    Attributes:
        site: index of the site in the statistics.
        units: range of its units in the statistics.
        module: path of the module.
        side: "rows" of W, the outputs y_u of the unit; "columns" of W, its inputs z_u; or its "bias".
        index: the outputs or inputs, int64 [width * size], or None for all of them in order.
        width: number of units.
    """

    site: int
    units: slice
    module: str
    side: str
    index: Tensor | None
    width: int

    def take(self, x: Tensor) -> Tensor:
        """Returns what belongs to the units of x [..., features], [..., width * size]."""
        return x if self.index is None else x[..., self.index.to(x.device)]

    def per_unit(self, x: Tensor) -> Tensor:
        """Sums x [..., width * size] over the slices of each unit, [..., width]."""
        return x.reshape(*x.shape[:-1], self.width, -1).sum(-1)


def module_slices(model: nn.Module, statistics: Statistics) -> list[ModuleSlice]:
    """Returns the parts of all sites, bound to their modules.

    Raises:
        SiteError: a part lies in no linear module, such as packed experts.
    """
    return [
        _bind(model, part, index, statistics.units(site), site)
        for index, site in enumerate(statistics.sites)
        for part in site.slices
    ]


def input_slices(owned: Sequence[ModuleSlice]) -> list[ModuleSlice]:
    """Returns the parts that read the activations of the units: columns of the module behind them."""
    return [part for part in owned if part.side == COLUMNS]


def _bind(model: nn.Module, part: ParamSlice, site_index: int, units: slice, site: Site) -> ModuleSlice:
    path, _, kind = part.parameter.rpartition(".")
    module = model.get_submodule(path)
    if not is_linear(module) or kind not in ("weight", "bias") or part.expert_index is not None:
        raise SiteError(
            f"{part.parameter} of {site.name} belongs to no linear module; gradients of its weights cannot be reduced "
            "to units; choose a criterion that needs activations only, or attribution"
        )
    outputs, inputs = weight_matrix(module).shape
    if kind == "bias":
        side, features = BIAS, outputs
    else:
        projection = projection_of(module, path)
        rows = projection is not None and part.dim == projection.output_dim
        side, features = (ROWS, outputs) if rows else (COLUMNS, inputs)
    index = part.index(torch.arange(site.width, device="cpu"))
    everything = len(index) == features and bool((index == torch.arange(features, device="cpu")).all())
    return ModuleSlice(site_index, units, path, side, None if everything else index, site.width)


class WeightInputRecorder:
    """At the end adds ``weighted_input`` to the statistics: sum over the weights w_ij of a unit of |w_ij| rms(z_j).

    It is added once for each record, so that its mean over the records is the sum itself, and merged statistics hold
    the mean of the recordings. rms(z_j) is the root mean square of input j over the counted tokens of a group: the
    norm of Wanda, made comparable between groups of different sizes. Set ``groups``, int8 [records, tokens], before
    each forward pass.

    Args:
        model: its modules are hooked, nothing is replaced.
        statistics: of the model; updated when this ends.

    Raises:
        SiteError: the weights of a unit lie in no linear module.
    """

    def __init__(self, model: nn.Module, statistics: Statistics) -> None:
        self.statistics = statistics
        self.groups = torch.zeros(0, 0, dtype=torch.int8, device="cpu")
        self._model = model
        self._by_module: dict[str, list[ModuleSlice]] = defaultdict(list)
        for owned in module_slices(model, statistics):
            if owned.side != BIAS:
                self._by_module[owned.module].append(owned)
        self._squares: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> WeightInputRecorder:
        for path in self._by_module:
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(self._hook(path)))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if kind is None and self._squares:
            self.statistics.allocate_record_sums(WEIGHTED_INPUT)
            weighted = self.weighted(torch.eye(len(self.statistics.groups), dtype=torch.bool, device="cpu"))
            self.statistics.record_sums[WEIGHTED_INPUT] += weighted * self.statistics.records[:, None]

    def count_records(self) -> None:
        """Counts the records of the last batch; call it once a batch."""
        of_record = self.groups.amax(dim=1).long()
        counts = torch.bincount(of_record, minlength=len(self.statistics.groups) + 1)
        self.statistics.records += counts[1:].to(self.statistics.records.device)

    @torch.no_grad()
    def weighted(self, members: Tensor) -> Tensor:
        """The sum over the weights of each unit of |w_ij| rms(z_j), z_j over all tokens of some groups together.

        Args:
            members: [rows, groups] bool, the groups of each row.

        Returns:
            [rows, units] float64, on the device of the statistics.
        """
        found = self.statistics.values.new_zeros(len(members), int(self.statistics.offsets[-1]))
        for path, parts in self._by_module.items():
            own = members.to(self._squares[path])
            rms = (own @ self._squares[path] / (own @ self._tokens[path]).clamp_min(1.0)).sqrt()
            weight = weight_matrix(self._model.get_submodule(path)).detach().abs().double()
            for owned in parts:
                weighted = weight.sum(0) * rms if owned.side == COLUMNS else rms @ weight.T
                found[:, owned.units] += owned.per_unit(owned.take(weighted)).to(found.device)
        return found

    def _hook(self, path: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            group = self.groups.to(arguments[0].device)
            of_record = group.amax(dim=1)
            numbers = torch.arange(1, len(self.statistics.groups) + 1, device=group.device)
            members = (of_record == numbers[:, None]).double()
            counted = group != 0
            z = arguments[0].reshape(*group.shape, -1)
            squares = torch.where(counted[..., None], z.double(), 0.0).square().sum(1)
            self._squares[path] = self._squares.get(path, 0.0) + members @ squares
            tokens = counted.sum(1, keepdim=True).double()
            self._tokens[path] = self._tokens.get(path, 0.0) + members @ tokens

        return hook


class _BackwardRecorder:
    """Sees the inputs and the output gradients of linear modules in every backward pass, while it is entered.

    Set ``groups``, int64 [records], before each forward pass: the group of each row of the batch. Each record must
    add its own target to what is differentiated.

    Args:
        model: its modules are hooked, nothing is replaced.
        parts: what units own of them.
    """

    def __init__(self, model: nn.Module, parts: Sequence[ModuleSlice]) -> None:
        self.groups = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._model = model
        self._by_module: dict[str, list[ModuleSlice]] = defaultdict(list)
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
        super().__init__(model, module_slices(model, statistics))
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

    def _add_square(self, owned: ModuleSlice, square: Tensor, groups: Tensor) -> None:
        """Collects |g|² of all parts of a unit; once they are there, adds it."""
        self._squares[owned.site] = self._squares.get(owned.site, 0.0) + square.double().clamp_min(0.0)
        self._arrived[owned.site] += 1
        if self._arrived[owned.site] == len(self.statistics.sites[owned.site].slices):
            total = self._squares.pop(owned.site)
            del self._arrived[owned.site]
            self.statistics.add_records(SQUARE, owned.units, total, groups)


class MeanGradientRecorder(_BackwardRecorder):
    """At the end adds what the mean gradients ḡ over the records of each group are, to statistics.

    Per unit, summed over its weights w_i: ``weight_product`` w_i ḡ_i, ``gradient_magnitude`` |ḡ_i| and
    ``gradient_overlap`` ḡ_i ḡ_forget,i. They are added once for each record, so that their mean over the records is
    the number itself, and merged statistics hold the mean of the recordings.

    The gradients are held as matrices in float32, one per group: see ``mean_gradient_recorders`` for how much that is.

    Args:
        model: see ``_BackwardRecorder``.
        statistics: of the model, with all records counted; updated when this ends.
        parts: of the units of the statistics.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, parts: Sequence[ModuleSlice]) -> None:
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
            weight, bias = weight_matrix(module).detach(), output_bias(module)
            counts = records.clamp_min(1).to(gradients)
            means = gradients.div_(counts[:, None, None])
            bias_means = (self._bias_gradients[path] / counts[:, None])[..., None]
            for owned in self._by_module[path]:
                if owned.side == BIAS:
                    assert bias is not None
                    self._add_sums(owned, bias.detach()[:, None], bias_means)
                else:
                    self._add_sums(owned, weight, means)

    def _add_sums(self, owned: ModuleSlice, weight: Tensor, means: Tensor) -> None:
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

    The gradients of a weight take 4 bytes per group (8 in float64), as long as its recorder is entered. There are as
    few recorders as keep them below ``most`` bytes, one for all where they fit; a module is never split.

    Raises:
        SiteError: the weights of a unit lie in no linear module.
    """
    modules: dict[str, list[ModuleSlice]] = defaultdict(list)
    for owned in module_slices(model, statistics):
        modules[owned.module].append(owned)

    def bytes_of(path: str) -> int:
        weight = weight_matrix(model.get_submodule(path))
        return len(statistics.groups) * weight.numel() * (8 if weight.dtype == torch.float64 else 4)

    for paths in chunks(((path, bytes_of(path)) for path in modules), most):
        yield MeanGradientRecorder(model, statistics, [owned for path in paths for owned in modules[path]])


def chunks(sizes: Iterable[tuple[str, int]], most: int) -> Iterator[list[str]]:
    """Yields paths in their order, as many at once as have sizes of ``most`` together, or one that is larger alone."""
    chunk: list[str] = []
    together = 0
    for path, size in sizes:
        if chunk and together + size > most:
            yield chunk
            chunk, together = [], 0
        chunk.append(path)
        together += size
    yield chunk


def _records(x: Tensor, groups: Tensor) -> Tensor:
    """Returns x as [records, tokens, features], in float32 or float64; some models flatten the first two."""
    return wide(x).reshape(len(groups), -1, x.shape[-1])


def _quadratic(gram: Tensor, own: Tensor) -> Tensor:
    """The sum over t, t' of own_t own_t' gram_tt', [records, features], from gram [records, tokens, tokens]."""
    return ((gram @ own) * own).sum(1)
