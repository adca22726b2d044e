"""Recording at the input of a projection, by a hook on that one module: where nothing is there to be fused."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clue_fast.patching.recorder import Point


class RecordInput:
    """Forward pre-hook of the projection that reads the activations of a site."""

    def __init__(self, point: Point) -> None:
        self.point = point

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Records the first argument; replaces it where its gradient is to be recorded in backward."""
        if not self.point.recorder.recording:
            return None
        name = None if args else next(iter(kwargs))
        h: Tensor = self.point.recorder.observe(self.point, args[0] if name is None else kwargs[name])
        return ((h, *args[1:]), kwargs) if name is None else ((), kwargs | {name: h})
