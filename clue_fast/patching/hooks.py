"""Recording at a projection, by a hook on that one module: where nothing is there to be fused."""

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


class RecordOutput:
    """Forward hook of the projection that gives the activations of a site, perhaps among those of other sites."""

    def __init__(self, point: Point) -> None:
        self.point = point
        self.channels = point.site.given_channels()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
        """Records the channels of the site; replaces them where their gradient is to be recorded in backward."""
        if not self.point.recorder.recording:
            return None
        channels = self.channels.to(y.device)
        h = y.index_select(-1, channels)
        watched = self.point.recorder.observe(self.point, h)
        return None if watched is h else y.index_copy(-1, channels, watched)
