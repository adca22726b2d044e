"""Patching: the fused forward of every site, and recording, for one instance of a model.

A patched module keeps its children, its state and its place; only its class is swapped for a subclass whose forward
calls the fused operator. Classes of libraries are never modified, so other models are untouched, and a deep copy of
a patched model is a patched model of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast import ops
from clue_fast.errors import NonFiniteError, PatchError, SiteError
from clue_fast.ops import backend as backends
from clue_fast.sites import Site, find_sites, model_fingerprint, projection
from clue_fast.statistics import Statistics

_SITE_STATE = "_clue_fast_site"
_PATCHED = "_clue_fast_patched"


@dataclass
class Recorder:
    """What the patched modules of one model share: where to count, and the groups of the tokens now in flight."""

    statistics: Statistics
    backend: str | None = None
    default_group: int = 0
    recording: bool = False
    gradients: bool = False
    group: Tensor | None = None
    launches: dict[str, int] = field(default_factory=dict)


@dataclass
class _SiteState:
    site: Site
    units: slice
    recorder: Recorder


class FusedMLP(nn.Module):
    """Forward of a gated MLP through ``ops.gated_activation``; mixed into the class of a patched module."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Returns down(act(gate(x)) · up(x)), [..., width of the model]."""
        state: _SiteState = getattr(self, _SITE_STATE)
        gate, up = self.gate_proj(x), self.up_proj(x)
        recorder = state.recorder
        recorder.launches[state.site.path] = recorder.launches.get(state.site.path, 0) + 1
        if not recorder.recording:
            h = ops.gated_activation(gate, up, state.site.activation, backend=recorder.backend)
            return self._down(h)
        group = _group_for(state, gate)
        statistics = recorder.statistics
        # A recomputation under gradient checkpointing must not count its tokens again.
        recomputing = torch._C._current_graph_task_id() != -1
        gradient_values = statistics.gradient_values if recorder.gradients else None
        h = ops.gated_activation(
            gate,
            up,
            state.site.activation,
            group=group,
            statistics=None if recomputing else statistics.values[:, :, state.units],
            gradient_statistics=None if gradient_values is None else gradient_values[:, :, state.units],
            backend=recorder.backend,
        )
        return self._down(h)

    def _down(self, h: Tensor) -> Tensor:
        y: Tensor = self.down_proj(h)
        return y


def _group_for(state: _SiteState, gate: Tensor) -> Tensor:
    group = state.recorder.group
    tokens = gate.numel() // gate.shape[-1] if gate.shape[-1] else 0
    if group is None:
        raise PatchError("recording needs the patched model itself to be called, not one of its parts")
    if group.numel() != tokens:
        raise PatchError(
            f"{state.site.path} sees {tokens} tokens, the batch has groups for {group.numel()}; "
            "pass token_group with one entry a token"
        )
    return group


_fused_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _fused_classes:
        name = f"Fused{original.__name__}"
        _fused_classes[original] = type(name, (FusedMLP, original), {"__module__": __name__})
    return _fused_classes[original]


@dataclass(frozen=True)
class SiteReport:
    """What runs at one site: the operator, its backend, why no better one, and how often it was launched."""

    site: Site
    operator: str
    backend: str
    reason: str
    launches: int


class Report:
    """What ``patch`` replaced, site by site; prints as a table."""

    def __init__(self, sites: list[SiteReport], tokens: Mapping[str, int]) -> None:
        self.sites = sites
        self.tokens = dict(tokens)

    def __str__(self) -> str:
        width = max(len(entry.site.path) for entry in self.sites)
        lines = [f"{'site':<{width}}  units  operator          backend    launches  note"]
        lines += [
            f"{entry.site.path:<{width}}  {entry.site.width:>5}  {entry.operator:<16}  {entry.backend:<9}"
            f"  {entry.launches:>8}  {entry.reason}".rstrip()
            for entry in self.sites
        ]
        lines.append("tokens recorded: " + ", ".join(f"{name} {count}" for name, count in self.tokens.items()))
        return "\n".join(lines)


class Patched:
    """A patched model: records statistics, and can be undone. Also a context manager that undoes it at its end."""

    def __init__(self, model: nn.Module, sites: list[Site], backend: str | None) -> None:
        self.model = model
        self.sites = tuple(sites)
        device = next(model.parameters()).device
        self._recorder = Recorder(Statistics(sites, model_fingerprint(model), device=device), backend)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._originals: dict[str, type[nn.Module]] = {}
        for site in sites:
            self._replace(site)
        self._handles.append(model.register_forward_pre_hook(self._assign_groups, with_kwargs=True))

    @property
    def statistics(self) -> Statistics:
        """The statistics recorded so far."""
        return self._recorder.statistics

    @contextmanager
    def record(self, group: str, *, gradients: bool = False) -> Iterator[Statistics]:
        """Counts the tokens of every forward pass inside the block into a group.

        Padding (``attention_mask`` 0) is not counted. A batch may instead bring its own ``token_group``, [batch,
        tokens] int8: 0 = not counted, 1 = forget, 2 = retain, and so on in the order of ``statistics.groups``.

        Args:
            group: name of the group, such as "forget"; a new name makes a new group.
            gradients: also record a·∂L/∂a in backward passes.

        Raises:
            PatchError: inside another recording, or after ``unpatch``.
            NonFiniteError: at the end, if an activation or gradient was NaN or infinite, naming the site.
        """
        recorder = self._recorder
        if not self._originals:
            raise PatchError("the model was unpatched; patch it again to record")
        if recorder.recording:
            raise PatchError("already recording; leave the first block before the second begins")
        recorder.default_group = recorder.statistics.group_index(group)
        if gradients:
            recorder.statistics.allocate_gradients()
        recorder.recording, recorder.gradients = True, gradients
        try:
            yield recorder.statistics
        finally:
            recorder.recording, recorder.gradients, recorder.group = False, False, None
        recorder.statistics.check_finite()

    def forward_layers(self, **batch: Any) -> Any:
        """Runs the model without its language-model head, for recording: the same statistics for less."""
        args, kwargs = self._assign_groups(self.model, (), batch)
        return getattr(self.model, "base_model", self.model)(*args, **kwargs)

    def report(self) -> Report:
        """Returns what runs at every site and how many tokens were counted."""
        recorder = self._recorder
        entries = []
        for site in self.sites:
            device = projection(self.model, site.gate).weight.device
            choice = backends.choose("gated_activation", device, recorder.backend)
            launches = recorder.launches.get(site.path, 0)
            entries.append(SiteReport(site, "gated_activation", choice.name, choice.reason, launches))
        statistics = recorder.statistics
        tokens = {name: int(statistics.count[row].max()) for row, name in enumerate(statistics.groups)}
        return Report(entries, tokens)

    def unpatch(self) -> None:
        """Gives every module its class back; the model is then what it was before.

        Raises:
            PatchError: called twice, or while recording.
        """
        if not self._originals:
            raise PatchError("the model is not patched (any more)")
        if self._recorder.recording:
            raise PatchError("unpatch after the recording block, not inside it")
        for path, original in self._originals.items():
            module = self.model.get_submodule(path)
            module.__class__ = original
            del module.__dict__[_SITE_STATE]
        for handle in self._handles:
            handle.remove()
        self._originals.clear()
        self._handles.clear()
        self.model.__dict__.pop(_PATCHED, None)

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._originals:
            self._recorder.recording = False
            self.unpatch()

    def _replace(self, site: Site) -> None:
        module = self.model.get_submodule(site.path)
        self._originals[site.path] = type(module)
        module.__dict__[_SITE_STATE] = _SiteState(site, self._recorder.statistics.units(site), self._recorder)
        module.__class__ = _fused_class(type(module))

    def _assign_groups(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the model: turns the batch into one int8 a token, and counts the tokens."""
        recorder = self._recorder
        given = kwargs.pop("token_group", None)
        if recorder.recording:
            group = batch_groups(args, kwargs, given, recorder.default_group, len(recorder.statistics.groups))
            recorder.group = group.flatten()
            if torch._C._current_graph_task_id() == -1:
                counts = torch.bincount(recorder.group.long(), minlength=len(recorder.statistics.groups) + 1)
                recorder.statistics.count += counts[1:, None].to(recorder.statistics.count.device)
        return args, kwargs


def batch_groups(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Tensor | None, default: int, groups: int
) -> Tensor:
    """Returns the group of every token of a batch, [batch, tokens] int8.

    Args:
        args, kwargs: of the model's forward.
        given: the batch's own token_group, or None.
        default: group of the tokens that are no padding.
        groups: number of groups there are.

    Raises:
        PatchError: the groups do not fit the tokens, or are outside 0..groups.
    """
    tokens: Tensor | None = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        raise PatchError("recording found neither input_ids nor inputs_embeds in the batch")
    shape = tuple(tokens.shape[:2])
    if given is not None:
        if tuple(given.shape) != shape:
            raise PatchError(f"token_group has shape {tuple(given.shape)}, the batch has tokens {shape}")
        low, high = (int(given.min()), int(given.max())) if given.numel() else (0, 0)
        if low < 0 or high > groups:
            raise PatchError(f"token_group holds {low}..{high}, the recorded groups are 0..{groups}")
        return given.to(tokens.device, torch.int8)
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is None:
        return torch.full(shape, default, dtype=torch.int8, device=tokens.device)
    if mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
        raise PatchError(
            f"recording reads attention_mask as [batch, tokens], got {tuple(mask.shape)} for tokens {shape}; "
            "pass token_group"
        )
    # While generating, the mask also covers tokens of earlier calls; the last ones belong to this call.
    return (mask[:, mask.shape[1] - shape[1] :] != 0).to(torch.int8) * default


def patch(model: nn.Module, *, backend: str | None = None) -> Patched:
    """Replaces the forward of every site of this model by the fused one.

    Args:
        model: any model with sites, see ``find_sites``; only this instance is touched.
        backend: forces a backend, see ``clue_fast.ops.backend``; default is the best that runs here.

    Raises:
        PatchError: the model is patched already.
        SiteError: no site was found, or one does not compute down(act(gate) · up).
        NonFiniteError: a site gives NaN or infinity on finite input.
        BackendError, UnknownNameError: the backend cannot run here, or does not exist.
    """
    if _PATCHED in model.__dict__:
        raise PatchError(f"this {type(model).__name__} is patched already; unpatch it first")
    sites = find_sites(model)
    for site in sites:
        backends.choose("gated_activation", projection(model, site.gate).weight.device, backend)
        _probe(model, site, backend)
    patched = Patched(model, sites, backend)
    model.__dict__[_PATCHED] = patched
    return patched


def unpatch(model: nn.Module) -> None:
    """Undoes ``patch``. Raises PatchError if the model is not patched."""
    patched = model.__dict__.get(_PATCHED)
    if not isinstance(patched, Patched):
        raise PatchError(f"this {type(model).__name__} is not patched")
    patched.unpatch()


@torch.no_grad()
def _probe(model: nn.Module, site: Site, backend: str | None) -> None:
    """Compares the fused forward with the module's own on a few random tokens."""
    module, gate, up, down = (model.get_submodule(path) for path in (site.path, site.gate, site.up, site.down))
    weight = projection(model, site.gate).weight
    if weight.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.shape[1], generator=generator).to(weight.device, weight.dtype)
    expected = module(x).float()
    if not bool(torch.isfinite(expected).all()):
        raise NonFiniteError(f"{site.path} gives NaN or infinity on finite input; check the weights of the model")
    found = down(ops.gated_activation(gate(x), up(x), site.activation, backend=backend)).float()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    if error > 8 * torch.finfo(weight.dtype).eps:
        raise SiteError(
            f"{site.path} ({type(module).__name__}) does not compute down(act(gate) · up): off by {error:.1e}; "
            "it cannot be patched"
        )
