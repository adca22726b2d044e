"""The layers of a model: which list of modules they are, and which of them a module or a parameter is in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class LayerList:
    """The layers of a model.

    Attributes:
        path: of their list in the model, or "" where there is none.
        modules: the layers, from the first on.
    """

    path: str = ""
    modules: tuple[nn.Module, ...] = ()

    def number_of(self, path: str) -> int | None:
        """The number of the layer that a module or parameter is in, or is; None for what is in none."""
        return number_in(self.path, path)


def number_in(layers: str, path: str) -> int | None:
    """The number of the layer, of those in the list at a path, that a module or parameter is in, or is; or None."""
    if not layers or not path.startswith(f"{layers}."):
        return None
    return int(path.removeprefix(f"{layers}.").partition(".")[0])


def find_layers(model: nn.Module, paths: Iterable[str] = ()) -> LayerList:
    """Finds the layers of a model: of the lists of modules that lie in no other, the one with the most parameters.

    Args:
        model: not wrapped.
        paths: of modules or parameters which the layers have to hold, all of them: so those of one tower of several.
    """
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and path}
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    wanted = list(paths)
    holding = [path for path in outer if all(own.startswith(f"{path}.") for own in wanted)]
    sizes = {path: sum(p.numel() for p in lists[path].parameters()) for path in holding}
    path = max(sizes, key=lambda path: sizes[path], default="")
    return LayerList(path, tuple(lists[path])) if path else LayerList()
