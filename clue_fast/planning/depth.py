"""A model of many layers, a few of which stand for all: what a run of those takes says what a run of all would.

Layers of one kind allocate and compute the same, but for those at the ends: nothing runs backward below the first that
trains, what all layers of a kind share, such as a mask, is freed by the first of them in the backward pass, and what
the last one reads is freed behind it. So the first two layers and the last two stay, and two further ones of each kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from torch import nn

from clue_fast.internals import own_parameters
from clue_fast.trainer.tracing import Interval


@dataclass(frozen=True)
class Depth:
    """The layers of a model, and those that stand for all.

    Attributes:
        path: of their list in the model, or "" where there is none and the model runs whole.
        kept: numbers of the layers that stay.
        stands_in: for each layer of the whole model the place of that among ``kept`` which stands for it.
    """

    path: str = ""
    kept: tuple[int, ...] = ()
    stands_in: tuple[int, ...] = ()

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers of a model, whole or reduced."""
        return list(model.get_submodule(self.path).children()) if self.path else []

    def layer_of(self, path: str) -> int | None:
        """The place of the layer that a parameter or module of a reduced model is in, or None."""
        if not self.path or not path.startswith(f"{self.path}."):
            return None
        return int(path.removeprefix(f"{self.path}.").partition(".")[0])

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


def find_depth(model: nn.Module) -> Depth:
    """Finds the layers of a model: the list of modules with the most parameters that lies in no other."""
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {path: module for path, module in lists.items() if not any(path.startswith(f"{other}.") for other in lists)}
    sizes = {path: sum(p.numel() for p in module.parameters()) for path, module in outer.items()}
    path = max(sizes, key=lambda path: sizes[path], default="")
    if not path:
        return Depth()
    layers = list(outer[path].children())
    kinds = [_kind(layer, number, model) for number, layer in enumerate(layers)]
    ends = {0, 1, len(layers) - 2, len(layers) - 1}
    kept = sorted({*ends, *(n for kind in set(kinds) for n in _places(kinds, kind, 1)[:2])})
    kept = [number for number in kept if 0 <= number < len(layers)]
    # Of the layers of a kind behind the first two, the second stands for those that go.
    second = {kind: _places(kinds, kind, 1)[:2][-1] for kind in set(kinds[1:])}
    stands_in = [kept.index(n if n in kept else second[kinds[n]]) for n in range(len(layers))]
    return Depth(path, tuple(kept), tuple(stands_in))


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


def _places(kinds: Sequence[Any], kind: Any, start: int) -> list[int]:
    return [number for number, other in enumerate(kinds) if other == kind and number >= start]


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
