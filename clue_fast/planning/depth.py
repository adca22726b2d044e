"""A model of many layers, a few of which stand for all: what a run of those takes says what a run of all would.

Layers of one kind allocate and compute the same, but for those at the ends: nothing runs backward below the first that
trains, what all layers of a kind share, such as a mask, is freed by the first of them in the backward pass, and what
the last one reads is freed behind it. So the first two layers and the last two stay, and two further ones of each kind.
Where a part of the layers trains alone, layers below, inside and above it are of different kinds, and those at its ends
stay too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from clue_fast.internals import own_parameters
from clue_fast.sites.layers import find_layers, number_in
from clue_fast.trainer.tracing import Interval


@dataclass(frozen=True)
class Depth:
    """The layers of a model, and those that stand for all.

    Attributes:
        path: of their list in the model, or "" where there is none and the model runs whole.
        kept: numbers of the layers that stay.
        stands_in: for each layer of the whole model the place of that among ``kept`` which stands for it.
        part: numbers of the layers that train, if those are known.
    """

    path: str = ""
    kept: tuple[int, ...] = ()
    stands_in: tuple[int, ...] = ()
    part: frozenset[int] = frozenset()

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of a model, whole or reduced."""
        return list(model.get_submodule(self.path).children()) if self.path else []

    def layer_of(self, path: str) -> int | None:
        """The place of the layer that a parameter or module of a reduced model is in, or None."""
        return number_in(self.path, path)

    def trains(self, path: str) -> bool:
        """Whether a module of a reduced model is in a layer that trains, or stands for such."""
        place = self.layer_of(path)
        return place is not None and self.kept[place] in self.part

    def total(self, numbers: Iterable[tuple[str, int]]) -> int:
        """Adds up, over the whole model, numbers that were found in a reduced one at these paths."""
        times: dict[int | None, int] = {place: self.stands_in.count(place) for place in range(len(self.kept))}
        return sum(number * times.get(self.layer_of(path), 1) for path, number in numbers)

    def whole(self, intervals: Sequence[Interval]) -> list[Interval]:
        """The parts of a run of the whole model, from those of a reduced one."""
        found: list[Interval] = []
        for in_layers, run in groupby(intervals, key=lambda interval: interval.layer is not None):
            parts = list(run)
            if not in_layers:
                found += map(self._of_all, parts)
                continue
            by_place = {interval.layer: interval for interval in parts}
            order = self.stands_in if parts[0].layer == 0 else self.stands_in[::-1]
            found += [by_place[place] for place in order if place in by_place]
        return found

    def _of_all(self, interval: Interval) -> Interval:
        """A part between layers, in which not these layers alone give back what they had kept, but all."""
        more = sum(size * (self.stands_in.count(place) - 1) for place, size in interval.freed.items())
        return replace(interval, change=interval.change - more)


def find_depth(model: nn.Module, part: Collection[int] = ()) -> Depth:
    """Finds the layers of a model, see ``find_layers``, and those of them that stand for all.

    Args:
        model: on the meta device.
        part: numbers of the layers that train, if those are known; the others run only.
    """
    found = find_layers(model)
    if not found.path:
        return Depth()
    layers = found.modules
    first, last = min(part, default=0), max(part, default=len(layers) - 1)
    sides = [(number in part, number < first) for number in range(len(layers))]
    kinds = [(_kind(layer, number, model), sides[number]) for number, layer in enumerate(layers)]
    ends = {0, 1, len(layers) - 2, len(layers) - 1, first - 1, first, first + 1, last - 1, last, last + 1}
    others = [number for number in range(len(layers)) if number not in (0, first, last + 1)]  # not first of a side
    places = {kind: [number for number in others if kinds[number] == kind] for kind in set(kinds)}
    kept = sorted({*ends, *(n for own in places.values() for n in own[:2])})
    kept = [number for number in kept if 0 <= number < len(layers)]
    # Of the layers of a kind behind the first two, the second stands for those that go.
    second = {kind: own[:2][-1] for kind, own in places.items() if own}
    stands_in = [kept.index(n if n in kept else second[kinds[n]]) for n in range(len(layers))]
    return Depth(found.path, tuple(kept), tuple(stands_in), frozenset(part))


def reduce_depth(model: Any, depth: Depth) -> None:
    """Leaves of a model, in place, the layers that stand for all."""
    if not depth.path or len(depth.kept) == len(depth.stands_in):
        return
    layers, config = model.get_submodule(depth.path), model.config
    parent, _, name = depth.path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers[number] for number in depth.kept))
    for key, value in list(vars(config).items()):
        if "layer" in key and isinstance(value, list | tuple) and len(value) == len(depth.stands_in):
            setattr(config, key, [value[number] for number in depth.kept])
    config.num_hidden_layers = len(depth.kept)


def _kind(layer: nn.Module, number: int, model: Any) -> Any:
    """What tells a layer from others: its modules, their parameters and settings, and what the configuration says."""
    modules = []
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, int | float | str | bool | None) and not name.startswith("_") and "idx" not in name
        }
        shapes = {name: (tuple(p.shape), p.dtype) for name, p in own_parameters(module).items()}
        modules.append((path, type(module), repr(sorted(settings.items())), repr(sorted(shapes.items()))))
    types = getattr(getattr(model, "config", None), "layer_types", None) or ()
    return (tuple(modules), types[number] if number < len(types) else None)


def peak_of(intervals: Iterable[Interval], freed: Callable[[Interval], int] | None = None) -> int:
    """Returns the most bytes that are in use in a run.

    Args:
        intervals: its parts.
        freed: bytes that are given away at the end of a part, which a run on one GPU would keep.
    """
    live = peak = 0
    for interval in intervals:
        peak = max(peak, live + interval.peak)
        live += interval.change - (0 if freed is None else freed(interval))
    return peak
