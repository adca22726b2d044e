"""The recorder: what the patched modules of one model share, and how they count."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clue_fast import internals, ops
from clue_fast.errors import PatchError
from clue_fast.ops import CLOSED_FORMS, Scoring
from clue_fast.ops.expert_statistics import add_statistics, unit_activations
from clue_fast.ops.unit_attribution import watch_gradient
from clue_fast.recording.tokens import IMAGES, Batch, TokenGroups
from clue_fast.sites import Site
from clue_fast.statistics import Statistics

ON_NONFINITE = ("raise", "skip_batch", "count")
PENDING = 64


@dataclass
class Point:
    """Where activations are recorded: one site, or all the experts that are stacked in a module.

    Attributes:
        sites: the site, or those of the experts in order.
        numbers: their range among the sites of the statistics.
        units: the range of their units in the accumulators.
        tower: whose tokens it sees, see ``clue_fast.recording.tokens``.
        recorder: shared by all points of a model.
        launches: how often it was recorded, by eager code.
    """

    sites: tuple[Site, ...]
    numbers: slice
    units: slice
    tower: str
    recorder: Recorder
    launches: int = 0

    @property
    def site(self) -> Site:
        """The site, or the first of them."""
        return self.sites[0]


@dataclass
class Recorder:
    """Where to count, how, and the tokens in flight.

    Attributes:
        statistics: the accumulators.
        backend: forces a backend of the operators.
        recording, gradients, tokens, score, on_nonfinite, default_group: see ``Patched.record``.
        batch: the pass in flight, or the last one.
        in_flight: whether the model is running.
        generating: positions counted so far, by tower, while ``generate`` runs.
        pending: passes whose backward may still come.
        recomputed: whether gradient checkpointing has run one of them again.
        invalid_tokens: tokens in groups that there are not, seen by compiled code.
        per_device: accumulators on other devices than that of ``statistics``.
        sums, gradient_sums: which are added to, of ``ops.SUMS`` and ``ops.GRADIENT_SUMS``; sums may be None, for none.
        left_out: the statistics that they leave out, see ``Statistics.leave_out``.
        snapshots: the accumulators before the batch in flight, to take it back.
    """

    statistics: Statistics
    backend: str | None = None
    recording: bool = False
    gradients: bool = False
    tokens: str | None = None
    score: str | None = None
    on_nonfinite: str = "raise"
    default_group: int = 0
    batch: Batch | None = None
    in_flight: bool = False
    generating: dict[str, int] | None = None
    pending: list[Batch] = field(default_factory=list)
    recomputed: bool = False
    invalid_tokens: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64, device="cpu"))
    per_device: dict[torch.device, Statistics] = field(default_factory=dict)
    sums: str | None = "all"
    gradient_sums: str = "all"
    left_out: frozenset[str] = frozenset()
    snapshots: list[Tensor] = field(default_factory=list)

    # Recording.

    def take(self, fields: frozenset[str] | None) -> None:
        """Has these sums taken from now on, of ``ops.FIELDS`` and ``ops.GRADIENT_FIELDS``; None for all there are."""
        every = frozenset(ops.FIELDS) | frozenset(ops.GRADIENT_FIELDS if self.gradients else ())
        asked = every if fields is None else fields
        self.sums = ops.sums_with(asked.intersection(ops.FIELDS), ops.SUMS) if asked & set(ops.FIELDS) else None
        self.gradient_sums = ops.sums_with(asked.intersection(ops.GRADIENT_FIELDS), ops.GRADIENT_SUMS)
        taken = {*ops.SUMS.get(self.sums or "", ()), *ops.GRADIENT_SUMS[self.gradient_sums]}
        self.left_out = every - taken
        self.statistics.leave_out(self.left_out)

    def gated_activation(self, point: Point, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        """Returns act(gate) · up, [..., channels], recorded on the way if the recorder records."""
        refuse_distributed(point.site, gate)
        if not self.recording:
            return ops.gated_activation(gate, up, activation, backend=self.backend)
        check_channels(point.site, gate)
        if self.on_nonfinite == "count":
            return self.observe(point, ops.gated_activation(gate, up, activation, backend=self.backend))
        found = self.groups_at(point, gate)
        statistics = self._accumulators(gate.device)
        recomputing = self.is_recomputing()
        if not recomputing:
            self._count(point, statistics, found.counts[:, None])
        gradient_values = statistics.gradient_values if self.gradients else None
        h = ops.gated_activation(
            gate,
            up,
            activation,
            group=found.group,
            statistics=None if recomputing or self.sums is None else statistics.values[:, :, point.units],
            gradient_statistics=None if gradient_values is None else gradient_values[:, :, point.units],
            sums=self.sums or "all",
            gradient_sums=self.gradient_sums,
            scoring=_scoring(point, statistics),
            backend=self.backend,
        )
        return h if gradient_values is None else _outlasting(h, statistics)

    def observe(self, point: Point, h: Tensor) -> Tensor:
        """Records activations, [..., units * channels], and returns them, watched where gradients are recorded."""
        refuse_distributed(point.site, h)
        check_channels(point.site, h)
        channels = point.site.channels
        found = self.groups_at(point, h)
        statistics = self._accumulators(h.device)
        if not self.is_recomputing():
            a = unit_activations(h.detach(), channels).flatten(0, -2)
            found = self._finite_only(point, statistics, a, found)
            self._count(point, statistics, found.counts[:, None])
            values, scoring = statistics.values[:, :, point.units], _scoring(point, statistics)
            if self.sums is not None:
                add_statistics(a, found.group, values, backend=self.backend, scoring=scoring)
        return self._watch(h, found.group, statistics, point)

    def observe_experts(self, point: Point, h: Tensor, group: Tensor, expert: Tensor, bounds: Tensor) -> Tensor:
        """Records the activations of stacked experts and returns them, watched where gradients are recorded.

        Args:
            point: all experts of the module.
            h: [rows, channels], a row for every expert that a token was sent to, sorted by expert.
            group: [rows] int8, of the token.
            expert: [rows] int64.
            bounds: [experts + 1] int64, where the rows of each expert begin.
        """
        statistics = self._accumulators(h.device)
        if not self.is_recomputing():
            groups, experts = len(statistics.groups), len(point.sites)
            if self.on_nonfinite == "count":
                finite = torch.isfinite(h.detach()).all(-1)
                lost = _tally(torch.where(finite, 0, group), expert, groups, experts)
                statistics.nonfinite[:, point.numbers] += lost
                group = torch.where(finite, group, 0)
            self._count(point, statistics, _tally(group, expert, groups, experts))
            values, scoring = statistics.values[:, :, point.units], _scoring(point, statistics)
            if self.sums is not None:
                add_statistics(h.detach(), group, values, bounds, self.backend, scoring)
        return self._watch(h, group, statistics, point, bounds)

    def is_recomputing(self) -> bool:
        """Whether gradient checkpointing runs the forward a second time, inside backward.

        Compiled code is compiled once for forward passes and once for this, by ``in_flight``.
        """
        if torch.compiler.is_compiling():
            return self.recording and not self.in_flight and bool(self.pending)
        return internals.is_recomputing()

    def groups_at(self, point: Point, h: Tensor) -> TokenGroups:
        """Returns the groups of the tokens of activations [..., channels] at a point.

        Raises:
            PatchError: they are not the tokens of the batch.
        """
        tokens = h.shape[:-1].numel()
        batch = self._batch_at(point)
        if point.tower == IMAGES:
            found = batch.towers.get(IMAGES)
            if found is None or found.group.numel() != tokens:
                found = batch.assign_images(tokens, h.device)
        else:
            known = batch.towers.get(point.tower)
            if known is None:
                raise PatchError(f"{point.site.name} ran outside the forward of its {point.tower}")
            found = known
        if found.group.numel() != tokens:
            raise PatchError(
                f"{point.site.name} sees {tokens} tokens, the batch has groups for {found.group.numel()}; "
                "pass token_group with one entry per token. Experts that are modules of their own, given some of the "
                "tokens each, cannot be recorded"
            )
        if found.group.device != h.device:
            found = TokenGroups(found.group.to(h.device), found.counts.to(h.device))
        return found

    # One pass after the other.

    def begin(self, batch: Batch) -> None:
        """Takes the batch that a pass of the model starts with. Raises PatchError if it names no group there is."""
        invalid = batch.check()
        if invalid is not None:
            self.invalid_tokens += invalid.to(self.invalid_tokens.device)
        self.commit()
        self.batch, self.in_flight = batch, True
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if self.recomputed:
            self.pending, self.recomputed = [], False
        self.pending = [*self.pending[-PENDING:], batch]

    def commit(self) -> None:
        """Makes what the last batch added final, or takes it back if it is not finite and such are to be skipped.

        No value is looked at from the host, so that compiled code can do it as well.
        """
        if self.on_nonfinite != "skip_batch":
            return
        every = [self.statistics, *self.per_device.values()]
        tensors = [tensor for statistics in every for tensor in statistics.tensors()]
        if len(self.snapshots) != len(tensors):
            self.snapshots = [tensor.clone() for tensor in tensors]
            return
        home = self.statistics.skipped.device
        finite = torch.stack([torch.isfinite(tensor).all().to(home) for tensor in tensors]).all()
        for tensor, snapshot in zip(tensors, self.snapshots, strict=True):
            keep = finite.to(tensor.device)
            tensor.copy_(torch.where(keep, tensor, snapshot))
            snapshot.copy_(tensor)
        self.statistics.skipped += (~finite).to(torch.int64)

    def merged(self) -> Statistics:
        """Everything recorded until now, of all devices."""
        found = self.statistics
        for other in self.per_device.values():
            found = found.merge(other)
        return found

    def finish(self) -> None:
        """Ends a recording: the accumulators of other devices join the first."""
        self.commit()
        for other in self.per_device.values():
            self.statistics.add(other)
        self.per_device, self.snapshots, self.pending = {}, [], []
        self.take(None)
        self.recording, self.gradients, self.recomputed, self.in_flight = False, False, False, False
        self.batch = None

    def check(self) -> None:
        """Raises what compiled code could not: PatchError if tokens were in groups that there are not."""
        invalid, self.invalid_tokens = int(self.invalid_tokens), torch.zeros_like(self.invalid_tokens)
        if invalid:
            raise PatchError(
                f"token_group named {invalid} times a group outside 0..{len(self.statistics.groups)}, and those tokens "
                "were not counted; correct it and record anew"
            )

    def _batch_at(self, point: Point) -> Batch:
        if self.is_recomputing():
            return self._recomputed_batch(point)
        if self.batch is not None and self.in_flight:
            return self.batch
        if point.tower == IMAGES:  # images may be read before the text, by generate
            return Batch(self.default_group, len(self.statistics.groups), self.tokens)
        raise PatchError("recording needs the patched model itself to be called, not one of its parts")

    def _recomputed_batch(self, point: Point) -> Batch:
        """The batch that gradient checkpointing runs again, which must be the only one it can be."""
        self.recomputed = True
        if not self.pending:
            raise PatchError(f"{point.site.name} runs in a backward pass whose forward pass was not recorded")
        first, *others = self.pending
        for other in others:
            if torch.compiler.is_compiling() or not first.same_groups(other):
                raise PatchError(
                    "with gradient checkpointing, run backward after each forward pass while recording gradients: "
                    "several batches with different token groups wait for theirs"
                )
        return first

    # Accumulators.

    def _accumulators(self, device: torch.device) -> Statistics:
        if device == self.statistics.values.device:
            return self.statistics
        if device not in self.per_device:
            other = self.statistics.empty(device)
            other.leave_out(self.left_out)
            if self.gradients:
                other.allocate_gradients()
            self.per_device[device] = other
            if self.snapshots:
                self.snapshots += [tensor.clone() for tensor in other.tensors()]
        return self.per_device[device]

    def _count(self, point: Point, statistics: Statistics, counts: Tensor) -> None:
        """Counts the tokens of a pass, before they are added: their number is part of the scores."""
        statistics.count[:, point.numbers] += counts
        if not torch.compiler.is_compiling():
            point.launches += 1

    def _finite_only(self, point: Point, statistics: Statistics, a: Tensor, found: TokenGroups) -> TokenGroups:
        """The groups without the tokens that are not finite here, which are counted apart, if that was asked for."""
        if self.on_nonfinite != "count":
            return found
        finite = torch.isfinite(a).all(-1)
        group = torch.where(finite, found.group, 0)
        numbers = torch.arange(1, len(statistics.groups) + 1, dtype=torch.int8, device=group.device)
        counts = (group == numbers[:, None]).sum(1)
        statistics.nonfinite[:, point.numbers] += (found.counts - counts)[:, None]
        return TokenGroups(group, counts)

    def _watch(
        self, h: Tensor, group: Tensor, statistics: Statistics, point: Point, bounds: Tensor | None = None
    ) -> Tensor:
        values = statistics.gradient_values
        if not self.gradients or values is None or not (torch.is_grad_enabled() and h.requires_grad):
            return h
        scoring = _scoring(point, statistics)
        scoring = None if scoring is None else scoring.in_backward()
        units, channels = values[:, :, point.units], point.site.channels
        return _outlasting(watch_gradient(h, group, units, channels, bounds, self.backend, scoring), statistics)


def refuse_distributed(site: Site, x: Tensor) -> None:
    """Raises PatchError if an activation is a DTensor: its shards are not whole tokens or whole units."""
    if hasattr(x, "full_tensor"):
        raise PatchError(
            f"{site.name} computes on a {type(x).__name__}; clue_fast records plain tensors: turn tensor parallelism "
            "off, or make its projections return local tensors of all channels"
        )


def check_channels(site: Site, h: Tensor) -> None:
    """Raises PatchError unless activations [..., channels] are those of all units of a site."""
    if h.shape[-1] != site.width * site.channels:
        raise PatchError(
            f"{site.name} has {site.width} units of {site.channels} channels, but its activations have "
            f"{h.shape[-1]} channels; is the model split over devices?"
        )


def _scoring(point: Point, statistics: Statistics) -> Scoring | None:
    """What writes the scores of the units at a point as their statistics are added to, if such are kept."""
    live = statistics.live
    if live is None:
        return None
    if CLOSED_FORMS[live.criterion].gradients and torch.compiler.is_compiling():
        statistics.live = None  # compiled code writes none of these, see Scoring: they are computed when asked for
        return None
    gradients = statistics.gradient_values if CLOSED_FORMS[live.criterion].gradients else None
    source = None if gradients is None else gradients[:, :, point.units]
    return Scoring(live.criterion, statistics.count[:, point.numbers], source, live.values[point.units])


def _outlasting(h: Tensor, statistics: Statistics) -> Tensor:
    """Returns h, whose backward may run in a later block: scores that were begun since are stale then, not written."""
    live = statistics.live
    if h.requires_grad and not torch.compiler.is_compiling():
        h.register_hook(  # type: ignore[no-untyped-call]
            lambda _: None if statistics.live is live else statistics.mark_stale()
        )
    return h


def _tally(group: Tensor, expert: Tensor, groups: int, experts: int) -> Tensor:
    """Number of rows of every group and expert, [groups, experts] int64."""
    cell = group.to(torch.int64) * experts + expert
    tally = torch.zeros((groups + 1) * experts, dtype=torch.int64, device=group.device)
    return tally.index_add(0, cell, torch.ones_like(cell)).reshape(groups + 1, experts)[1:]
