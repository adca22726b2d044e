"""Installing the recording of every site of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from clue_fast.errors import PatchError, SiteError
from clue_fast.ops import backend as backends
from clue_fast.patching.experts import ExpertsState, RecordedExperts
from clue_fast.patching.fused import FusedGatedMLP, GatedState
from clue_fast.patching.hooks import RecordInput, RecordOutput
from clue_fast.patching.probe import can_probe, probe, random_input
from clue_fast.patching.recorder import Point, Recorder
from clue_fast.patching.replacement import ForwardSwap, Hook, Override
from clue_fast.sites import Part, Site
from clue_fast.sites.experts import find_stack
from clue_fast.sites.projection import projection_of


@dataclass(frozen=True)
class Installed:
    """What runs at one point: the operator, on which device, whether fused, and what there is to say about it."""

    point: Point
    operator: str
    device: torch.device
    fused: bool
    note: str = ""


@dataclass
class Installation:
    """All that was installed, and all the changes to the model that undo it."""

    entries: list[Installed] = field(default_factory=list)
    changes: list[ForwardSwap | Hook | Override] = field(default_factory=list)

    def check(self) -> None:
        """Raises PatchError if a forward that was put in place was covered by another since."""
        for change in self.changes:
            if isinstance(change, ForwardSwap) and (reason := change.hidden()):
                raise PatchError(reason)

    def undo(self) -> None:
        """Takes every change back, or none. Raises PatchError, naming what is in the way."""
        obstacles = [obstacle for change in self.changes if (obstacle := change.obstacle())]
        if obstacles:
            raise PatchError(obstacles[0])
        for change in reversed(self.changes):
            change.undo()
        self.changes.clear()


def install(
    model: nn.Module, sites: Sequence[Site], recorder: Recorder, tower: Mapping[str, str], strict: bool
) -> Installation:
    """Installs the recording of every site; leaves the model as it was if that fails.

    Args:
        model: that the sites are of.
        sites: in the order of the statistics.
        recorder: shared by all.
        tower: by name of the site, whose tokens it sees.
        strict: see ``patch``.

    Raises:
        SiteError, NonFiniteError: see ``patch``.
    """
    made = Installation()
    try:
        for point in _points(sites, recorder, tower):
            made.entries.append(_install(model, point, made, strict))
    except BaseException:
        made.undo()
        raise
    return made


def _points(sites: Sequence[Site], recorder: Recorder, tower: Mapping[str, str]) -> list[Point]:
    """One point a site; stacked experts share one."""
    points = []
    numbered = enumerate(sites)
    for _, members in groupby(numbered, key=lambda item: (item[1].path, item[1].kind)):
        together = list(members)
        first, last = together[0][0], together[-1][0] + 1
        offsets = recorder.statistics.offsets
        units = slice(int(offsets[first]), int(offsets[last]))
        group = tuple(site for _, site in together)
        points.append(Point(group, slice(first, last), units, tower[group[0].name], recorder))
    return points


def _install(model: nn.Module, point: Point, made: Installation, strict: bool) -> Installed:
    site = point.site
    module = model.get_submodule(site.path)
    if site.structure in ("gated", "packed"):
        return _install_gated(model, module, point, made, strict)
    if site.structure == "experts":
        return _install_experts(module, point, made)
    return _install_hook(model, point, made)


def _install_gated(model: nn.Module, module: nn.Module, point: Point, made: Installation, strict: bool) -> Installed:
    site, recorder = point.site, point.recorder
    if site.activation is None:
        note = "does not compute down(act(gate) · up) with an activation that there is an operator for"
        if strict:
            raise SiteError(f"{site.path} ({type(module).__name__}) {note}; record it with strict=False")
        return _install_hook(model, point, made, f"not fused: it {note}")
    names = [path.removeprefix(f"{site.path}.") if site.path else path for path in (*site.inputs, site.output)]
    dropout = next((name for name, child in module.named_children() if isinstance(child, nn.Dropout)), None)
    slices = None if site.structure == "gated" else _slices(site)
    state = GatedState(point, site.activation, tuple(names[:-1]), slices, names[-1], dropout, site.multipliers)
    swap = ForwardSwap(site.path, module, FusedGatedMLP, state)
    device = _device(module)
    backends.choose("gated_activation", device, recorder.backend)
    unprobed = can_probe(module)
    if unprobed is None:
        projection = projection_of(model.get_submodule(site.inputs[0]), "")
        assert projection is not None
        try:
            probe(site, module, _while_swapped(swap, module), (random_input(module, projection.inputs),))
        except SiteError as error:
            if strict:
                raise
            return _install_hook(model, point, made, f"not fused: {error}")
    swap.apply()
    made.changes.append(swap)
    return Installed(point, "gated_activation", device, True, f"not probed: {unprobed}" if unprobed else "")


def _install_experts(module: nn.Module, point: Point, made: Installation) -> Installed:
    site = point.site
    stack = find_stack(module)
    assert stack is not None
    device = _device(module)
    backends.choose("channel_statistics", device, point.recorder.backend)
    swap = ForwardSwap(site.path, module, RecordedExperts, ExpertsState(point, stack, site.activation, _slices(site)))
    unprobed = can_probe(module)
    if unprobed is None:
        weight = getattr(module, stack.down)
        x = random_input(module, weight.shape[2 if stack.transposed else 1])[0]
        chosen = torch.arange(2 * len(x), device=x.device).reshape(-1, 2) % stack.experts
        weights = torch.full(chosen.shape, 0.5, dtype=x.dtype, device=x.device)

        def by_expert(*inputs: Tensor) -> Tensor:
            assert isinstance(module, RecordedExperts)
            hidden, chosen, weights = inputs
            return module.by_expert(hidden, chosen, weights, None)

        probe(site, module, _while_swapped(swap, by_expert), (x, chosen, weights))
    swap.apply()
    made.changes.append(swap)
    return Installed(point, "channel_statistics", device, False, f"not probed: {unprobed}" if unprobed else "")


def _install_hook(model: nn.Module, point: Point, made: Installation, note: str = "") -> Installed:
    projection = model.get_submodule(point.site.output)
    device = _device(projection)
    backends.choose("channel_statistics", device, point.recorder.backend)
    if point.site.structure == "rows":
        handle = projection.register_forward_hook(RecordOutput(point))
    else:
        handle = projection.register_forward_pre_hook(RecordInput(point), with_kwargs=True)
    made.changes.append(Hook(handle))
    return Installed(point, "channel_statistics", device, False, note)


def _while_swapped(swap: ForwardSwap, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Runs something with the forward swapped, and swaps it back."""

    def swapped(*inputs: Tensor) -> Tensor:
        swap.apply()
        try:
            return run(*inputs)
        finally:
            swap.undo()

    return swapped


def _slices(site: Site) -> tuple[slice, slice]:
    """Where gate and up are among the outputs of a projection that packs both: the first two parts of its weight."""
    gate, up = (part for part in site.parts if part.parameter == site.parts[0].parameter)
    return _slice(gate, site.width), _slice(up, site.width)


def _slice(part: Part, width: int) -> slice:
    return slice(part.offset, part.offset + (width - 1) * part.stride + 1, part.stride)


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))
