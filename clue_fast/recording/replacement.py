"""What patching does to a model: hooks, forwards and methods of instances, each of which can be undone.

A forward that replaces a module's own is first probed: compared with it on a few random tokens and the real weights.
Where nothing can be fused, a hook on the one projection that reads or gives the activations records them.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from clue_fast.errors import NonFiniteError, PatchError, SiteError
from clue_fast.internals import OLD_FORWARD
from clue_fast.ops import backend as backends
from clue_fast.recording.fused import STATE, ExpertsState, FusedGatedMLP, GatedState, RecordedExperts
from clue_fast.recording.recorder import Point, Recorder
from clue_fast.sites import ParamSlice, Site, device_of, evaluation_mode, mixed_class
from clue_fast.sites.experts import find_stack
from clue_fast.sites.projection import projection_of

TOKENS = 3


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


def can_probe(module: nn.Module) -> str | None:
    """Returns None if the weights of a module are there to be read, or else why not."""
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "its weights are not loaded"
        if hasattr(parameter, "full_tensor") or parameter.numel() == 0:
            return "its weights are sharded"
    return None


@torch.no_grad()
def probe(site: Site, module: nn.Module, fused: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
    """Compares a module with the forward that is to replace its own.

    Raises:
        NonFiniteError: the module gives NaN or infinity on finite input.
        SiteError: the forwards differ by more than rounding.
    """
    with evaluation_mode(module):
        expected, found = module(*inputs), fused(*inputs)
    if not bool(torch.isfinite(expected).all()):
        raise NonFiniteError(f"{site.path} gives NaN or infinity on finite input; check the weights of the model")
    expected, found = expected.double(), found.double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if error > 8 * torch.finfo(inputs[0].dtype).eps:
        remedy = "leave experts out of kinds" if site.kind == "expert" else "record it with strict=False"
        raise SiteError(
            f"{site.path} ({type(module).__name__}) does not compute down(act(gate) · up): off by {error:.1e}; {remedy}"
        )


def random_input(module: nn.Module, channels: int) -> Tensor:
    """Returns a few tokens for a module, [1, tokens, channels], in the precision and on the device of its weights."""
    parameters = [*module.parameters(), torch.empty(0, device="cpu")]
    dtype = next(p.dtype for p in parameters if p.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, TOKENS, channels, generator=generator, device="cpu").to(parameters[0].device, dtype)


@dataclass(eq=False)
class ForwardSwap:
    """A module with another forward.

    Its class becomes a subclass. A forward that others have set on the instance would hide that one: it is put aside
    (Liger, hub kernels), or, where it does something around the original (accelerate), told to call the new one.
    """

    path: str
    module: nn.Module
    mixin: type[nn.Module]
    state: Any

    def apply(self) -> None:
        """Swaps the forward."""
        module = self.module
        self.original = type(module)
        name = self.mixin.__name__.replace("MLP", "").replace("Experts", "").replace("Gated", "")
        self.swapped = mixed_class(self.mixin, self.original, name + self.original.__name__)
        self.aside: dict[str, Any] = {}
        module.__dict__[STATE] = self.state
        module.__class__ = self.swapped
        if OLD_FORWARD in module.__dict__:
            self.aside[OLD_FORWARD] = module.__dict__[OLD_FORWARD]
            module.__dict__[OLD_FORWARD] = types.MethodType(self.swapped.forward, module)
        elif "forward" in module.__dict__:
            self.aside["forward"] = module.__dict__.pop("forward")
        self.left = self._instance_forwards()

    def _instance_forwards(self) -> dict[str, Any]:
        return {name: self.module.__dict__.get(name) for name in ("forward", OLD_FORWARD)}

    def hidden(self) -> str | None:
        """Returns why the forward that was put in place does not run, or None if it does."""
        if type(self.module).forward is self.swapped.forward:
            return None
        return (
            f"{self.path} is a {type(self.module).__name__} since it was patched, whose forward records nothing; "
            "unpatch, and patch again after what changed it"
        )

    def unavailable_reason(self) -> str | None:
        """Returns why this cannot be undone now, or None."""
        if self.mixin not in type(self.module).__mro__:  # given another class since, without this forward
            return None
        if type(self.module) is not self.swapped:
            return (
                f"{self.path} is a {type(self.module).__name__} now and was a {self.swapped.__name__} when it was "
                "patched; undo what changed its class first"
            )
        if any(now is not self.left[name] for name, now in self._instance_forwards().items()):
            return f"the forward of {self.path} was replaced or wrapped since it was patched; undo that first"
        return None

    def undo(self) -> None:
        """Gives the module its class and forward back."""
        if type(self.module) is self.swapped:
            self.module.__class__ = self.original
        self.module.__dict__.pop(STATE, None)
        self.module.__dict__.update(self.aside)


@dataclass(eq=False)
class Hook:
    """A forward hook, until it is removed."""

    handle: RemovableHandle

    def unavailable_reason(self) -> str | None:
        """A hook can always be removed."""
        return None

    def undo(self) -> None:
        """Removes it."""
        self.handle.remove()


@dataclass(eq=False)
class Override:
    """A method of one instance that hides that of its class, or another of the instance."""

    module: nn.Module
    name: str
    method: Callable[..., Any]

    def apply(self) -> None:
        """Sets it."""
        self.before = self.module.__dict__.get(self.name)
        self.module.__dict__[self.name] = self.method

    def unavailable_reason(self) -> str | None:
        """Returns why this cannot be undone now, or None."""
        if self.module.__dict__.get(self.name) is self.method:
            return None
        return f"{type(self.module).__name__}.{self.name} was replaced since the model was patched; undo that first"

    def undo(self) -> None:
        """Lets what it hid be seen again."""
        del self.module.__dict__[self.name]
        if self.before is not None:
            self.module.__dict__[self.name] = self.before


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
        reasons = [reason for change in self.changes if (reason := change.unavailable_reason())]
        if reasons:
            raise PatchError(reasons[0])
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
    device = device_of(module)
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
    device = device_of(module)
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
    device = device_of(projection)
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
    """Where gate and up are among the outputs of a projection that packs both: the first two slices of its weight."""
    gate, up = (owned for owned in site.slices if owned.parameter == site.slices[0].parameter)
    return _slice(gate, site.width), _slice(up, site.width)


def _slice(owned: ParamSlice, width: int) -> slice:
    return slice(owned.offset, owned.offset + (width - 1) * owned.stride + 1, owned.stride)
