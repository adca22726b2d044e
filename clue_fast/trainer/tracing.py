"""What a run of a model on tensors without data allocates, and how many operations its matrix products take."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clue_fast.internals import (
    FakeTensorMode,
    TorchDispatchMode,
    flop_formulas,
    is_recomputing,
    storage_of,
    tree_leaves,
)
from clue_fast.ops.backend import ENVIRONMENT_VARIABLE
from clue_fast.recording import patched_of

Formula = Callable[..., int]


@contextmanager
def without_data() -> Iterator[FakeTensorMode]:
    """Tensors that are made have shapes and no data; operators are those in plain PyTorch, which such pass through."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = "reference"
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            yield mode
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


def copy_without_data(model: nn.Module) -> nn.Module:
    """Returns a copy of a model whose tensors have shapes and no data; to be called inside ``without_data``."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    patched = patched_of(model)
    if patched is not None:  # records nothing here; what it has recorded is not copied
        memo |= {id(kept): kept for kept in patched.accumulators()}
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class Interval:
    """A part of a run.

    Attributes:
        layer: the layer that ran, or None between layers.
        change: bytes in use at its end less those at its begin.
        peak: the most bytes in use, above those at its begin.
        flop: of matrix products and attention, a multiplication and an addition being two.
        freed: bytes that were freed in it, by the layer that had allocated them.
    """

    layer: int | None
    change: int
    peak: int
    flop: int
    freed: Mapping[int, int] = field(default_factory=dict)


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that operators allocate and that are still in use, apart from tensors that are known; and FLOP.

    Args:
        known: tensors that there were before.
        vocabulary: what has this as its last dimension is counted in ``logits`` too.
        counted: of the tokens of a record, how many are counted, and how many tokens it has: so many of them does a
            mask choose, whose values are not known. Only inside of ``without_data``.

    Attributes:
        live: bytes in use.
        peak: the most there have been.
        flop: operations so far.
        logits, logits_peak: the same of what has the vocabulary as its last dimension.
        intervals: the parts of the run until the last ``mark``.
    """

    def __init__(
        self, known: Iterable[Tensor], vocabulary: int | None = None, counted: tuple[int, int] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = {storage_of(tensor) for tensor in known}
        self._vocabulary, self._counted = vocabulary, counted
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._formulas = flop_formulas() | OWN_FORMULAS
        self.live = self.peak = self.logits = self.logits_peak = self.flop = 0
        self.intervals: list[Interval] = []
        self._start = self._highest = self._flop = 0
        self._layers: list[int | None] = []  # of all parts that there were
        self._freed: dict[int, int] = {}
        self._pieces: list[Interval] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func.overloadpacket)
        result = self._instead(name, args) if self._counted else NotImplemented
        if result is NotImplemented:
            result = func(*args, **kwargs)
        formula = self._formulas.get(name)
        if formula is not None:
            self.flop += formula(*args, **kwargs, out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and storage_of(tensor) not in self._known:
                self._watch(tensor)
        return result

    def _watch(self, tensor: Tensor) -> None:
        """Counts the storage of a tensor until it is freed."""
        key = storage_of(tensor)
        if key in self._watched:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        logits = size if tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary else 0
        part = len(self._layers)

        def freed(_: Any) -> None:
            if self._watched.pop(key, None) is not None:
                self.live -= size
                self.logits -= logits
                layer = self._layers[part] if part < len(self._layers) else None
                if layer is not None:
                    self._freed[layer] = self._freed.get(layer, 0) + size

        if self._freed:  # what layers had kept is given back by all of them before anything new comes
            self._end()
        self._watched[key] = weakref.ref(storage, freed)
        self.live += size
        self.logits += logits
        self.peak = max(self.peak, self.live)
        self._highest = max(self._highest, self.live)
        self.logits_peak = max(self.logits_peak, self.logits)

    def _instead(self, name: str, args: Any) -> Any:
        """The result of an operator that does not run without data as it does with them, or NotImplemented."""
        assert self._counted is not None
        counted, tokens = self._counted
        if name == "aten.index":
            x, indices = args
            if len(indices) == 1 and indices[0].dtype == torch.bool:
                chosen = indices[0].numel() // tokens * counted
                return x.new_empty(chosen, *x.shape[indices[0].dim() :])
        if name == "aten.nonzero":
            return args[0].new_empty(args[0].numel() // tokens * counted, args[0].dim(), dtype=torch.int64)
        if name == "aten._grouped_mm":  # where its kernel takes bfloat16 alone, others are multiplied in turn
            a, b, ends = args[:3]
            return a.new_empty(len(a), b.shape[-1]) if b.dim() == 3 else a.new_empty(len(ends), len(a), b.shape[-1])
        return NotImplemented

    # Parts of the run.

    def _begin(self) -> None:
        self._start, self._highest, self._flop, self._freed = self.live, self.live, self.flop, {}

    def _end(self) -> None:
        """Ends a piece of the part under way."""
        change, peak, flop = self.live - self._start, self._highest - self._start, self.flop - self._flop
        self._pieces.append(Interval(None, change, peak, flop, self._freed))
        self._begin()

    def mark(self, layer: int | None = None) -> None:
        """Ends a part of the run; it was that of a layer, or of none, which has an interval for each of its pieces."""
        self._end()
        self.intervals += self._pieces if layer is None else [_together(self._pieces, layer)]
        self._pieces = []
        self._layers.append(layer)

    def take(self) -> list[Interval]:
        """Returns the parts since this was called last."""
        self.mark()
        taken, self.intervals = self.intervals, []
        return taken

    @contextmanager
    def by_layer(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Ends a part of the run wherever a layer begins or ends, forward and backward, as long as the context lasts.

        The part of a layer reaches to the begin of the next.
        """
        handles: list[RemovableHandle] = []
        layers = list(layers)
        for number, layer in enumerate(layers):
            before = number - 1 if number else None
            last = number == len(layers) - 1
            handles.append(layer.register_forward_pre_hook(self._at_input(number, before), with_kwargs=True))
            if last:
                handles.append(layer.register_forward_hook(self._at_output(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _at_input(self, number: int, before: int | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if is_recomputing():
                return
            self.mark(before)
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.mark(number))

        return hook

    def _at_output(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if is_recomputing():
                return
            self.mark(number)
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: self.mark())

        return hook


def _together(pieces: Iterable[Interval], layer: int) -> Interval:
    """The pieces of a part as one interval."""
    change = peak = flop = 0
    freed: dict[int, int] = {}
    for piece in pieces:
        peak = max(peak, change + piece.peak)
        change, flop = change + piece.change, flop + piece.flop
        for place, size in piece.freed.items():
            freed[place] = freed.get(place, 0) + size
    return Interval(layer, change, peak, flop, freed)


def product_flop(*sizes: int) -> int:
    """Returns the operations of a matrix product, of its three sizes, or of several of one shape."""
    return 2 * prod(sizes)


def _grouped(a: Tensor, b: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Rows sorted by expert times matrices of the experts; or, for the gradient of those, rows times rows."""
    return product_flop(*a.shape, b.shape[-1])


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Two products of every query with every key; those that a causal mask hides are computed and counted."""
    queries, keys = query.shape[:-1].numel(), key.shape[-2]
    return product_flop(queries, keys, query.shape[-1]) + product_flop(queries, keys, value.shape[-1])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Five products: the scores anew, and the gradients of scores, values, queries and keys."""
    queries, keys = query.shape[:-1].numel(), key.shape[-2]
    return 3 * product_flop(queries, keys, query.shape[-1]) + 2 * product_flop(queries, keys, value.shape[-1])


def _selected_gradient(grad: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    return product_flop(grad.shape[:-1].numel(), *out_val.shape)


OWN_FORMULAS: dict[str, Formula] = {
    "aten.addmm_": lambda _, a, b, **__: product_flop(*a.shape, b.shape[1]),
    "aten._grouped_mm": _grouped,
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "transformers.grouped_mm_fallback": _grouped,
    "transformers.grouped_mm_fallback_backward": lambda x, weight, *_, **__: 2 * _grouped(x, weight, out_val=x),
    "clue_fast.expert_linear": lambda x, weight, *_, **__: product_flop(len(x), *weight.shape[1:]),
    "clue_fast.expert_linear_backward": lambda _, x, weight, *__, **___: 2 * product_flop(len(x), *weight.shape[1:]),
    "clue_fast.sparse_linear_backward": _selected_gradient,
}
"""Operations of what torch has no formula for, by the name of the operator."""
