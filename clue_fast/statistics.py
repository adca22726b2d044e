"""Statistics: what every unit of a model did, by site and group of tokens.

All sites share one tensor, so that scoring a whole model is one call, and merging, saving or reducing it one copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clue_fast.errors import FileFormatError, NonFiniteError, PatchError, SelectionError
from clue_fast.files import load_tensors, save_tensors
from clue_fast.ops import CLOSED_FORMS, FIELDS, GRADIENT_FIELDS, STATISTICS, conflict_score
from clue_fast.sites import Site

DEFAULT_GROUPS = ("forget", "retain")
MAX_GROUPS = 127
_MAXIMUM = FIELDS.index("magnitude_max")


@dataclass(frozen=True)
class UnitStatistics:
    """What the units of one site did on the tokens of one group.

    Reading what was left out of the recording raises PatchError, which names it.

    Attributes:
        count: number of tokens.
        mean, variance: of the activation, [width] float64; the variance is that of the population.
        abs_mean, max_abs: mean and maximum of its magnitude, [width] float64.
        active_fraction: share of the tokens where it is above zero, [width] float64.
        attribution, abs_attribution, square_attribution: means of a·∂L/∂a, of its magnitude and of its square,
            [width] float64, or None where no gradients were recorded.
        left_out: names of those that were not recorded of all tokens, see ``Patched.record``.
    """

    count: int
    mean: Tensor
    variance: Tensor
    abs_mean: Tensor
    max_abs: Tensor
    active_fraction: Tensor
    attribution: Tensor | None = None
    abs_attribution: Tensor | None = None
    square_attribution: Tensor | None = None
    left_out: frozenset[str] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        if name in STATISTICS and name in object.__getattribute__(self, "left_out"):
            raise PatchError(_not_recorded(name))
        return object.__getattribute__(self, name)

    def __repr__(self) -> str:
        recorded = [name for name in STATISTICS if name not in self.left_out and getattr(self, name) is not None]
        return f"UnitStatistics(count={self.count}, {', '.join(recorded)})"


def _not_recorded(*names: str) -> str:
    return (
        f"a recording left out {', '.join(names)}; reset the statistics and record with statistics={names}, or without "
        "statistics= and score="
    )


@dataclass
class LiveScores:
    """Scores that recording writes as it adds to the accumulators.

    Attributes:
        criterion: a closed form, one of ``ops.CRITERIA_OPS``.
        values: [units] float32.
        fresh: whether they are those of the accumulators, which are then only added to with their scores.
        skipped: batches that were left out when they were made so. Leaving one out takes it back from the accumulators
            where no value is looked at from the host, and from no score.
    """

    criterion: str
    values: Tensor
    fresh: bool
    skipped: int


class Statistics:
    """Accumulators of all sites.

    Attributes:
        sites: the sites, whose units lie side by side in the last dimension, in this order.
        groups: names of the groups; group ``g`` of a token counts into row ``g - 1``.
        values: [groups, 5, units] float64, the sums of ``ops.FIELDS``.
        gradient_values: [groups, 3, units] float64, the sums of ``ops.GRADIENT_FIELDS``, or None.
        count: [groups, sites] int64, tokens counted.
        record_sums: further sums over the records of a group, by name, each [groups, units] float64; some criteria
            need them, see ``clue_fast.localization``.
        records: [groups] int64, records counted into them.
        nonfinite: [groups, sites] int64, tokens left out because an activation was not finite, where asked for.
        skipped: [] int64, batches left out for that reason, where asked for.
        offsets: [sites + 1] int64, the range of units of each site.
        fingerprint: of the model, see ``model_fingerprint``.
        live: the scores that recording writes on the way, or None; see ``keep_scores``.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        fingerprint: str,
        groups: Sequence[str] = DEFAULT_GROUPS,
        device: torch.device | str = "cpu",
    ) -> None:
        self.sites = tuple(sites)
        self.fingerprint = fingerprint
        self.groups = list(groups)
        widths = torch.tensor([0] + [site.width for site in self.sites], dtype=torch.int64, device="cpu")
        self.offsets = widths.cumsum(0)
        units = int(self.offsets[-1])
        self.values = torch.zeros(len(self.groups), len(FIELDS), units, dtype=torch.float64, device=device)
        self.gradient_values: Tensor | None = None
        self.count = torch.zeros(len(self.groups), len(self.sites), dtype=torch.int64, device=device)
        self.record_sums: dict[str, Tensor] = {}
        self.records = torch.zeros(len(self.groups), dtype=torch.int64, device=device)
        self.nonfinite = torch.zeros_like(self.count)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.live: LiveScores | None = None
        self._numbers = {site: number for number, site in enumerate(self.sites)}
        # Of each group, the sums that do not have all of its tokens; and those that are left out since the tokens were
        # counted as the second says.
        self._incomplete: dict[str, frozenset[str]] = {}
        self._leaving_out: tuple[frozenset[str], Tensor] = frozenset(), self.count

    def group_index(self, name: str) -> int:
        """Returns the int8 that marks tokens of a group (1 for the first), adding the group if it is new."""
        if name not in self.groups:
            if len(self.groups) == MAX_GROUPS:
                raise PatchError(f"no room for group {name!r}: there are {MAX_GROUPS} already")
            self.groups.append(name)
            self.values = _with_row(self.values)
            self.count, self.nonfinite = _with_row(self.count), _with_row(self.nonfinite)
            self.records = _with_row(self.records)
            self.record_sums = {key: _with_row(sums) for key, sums in self.record_sums.items()}
            if self.gradient_values is not None:
                self.gradient_values = _with_row(self.gradient_values)
        return self.groups.index(name) + 1

    def leave_out(self, fields: frozenset[str] = frozenset()) -> None:
        """Remembers that from now on some sums are not added to, with those that were until now.

        Args:
            fields: of ``ops.FIELDS`` and ``ops.GRADIENT_FIELDS``.
        """
        self._incomplete = {name: self.incomplete(name) for name in self.groups}
        self._leaving_out = fields, self.count.clone() if fields else self.count

    def incomplete(self, group: str) -> frozenset[str]:
        """Returns the sums of a group that lack some of its tokens."""
        fields, before = self._leaving_out
        found = self._incomplete.get(group, frozenset())
        if not fields:
            return found
        row = self.groups.index(group)
        counted = self.count[row] if row >= len(before) else self.count[row] != before[row]
        return found | fields if bool(counted.any()) else found

    def left_out(self, group: str) -> frozenset[str]:
        """Returns the names of the statistics of a group that lack some of its tokens."""
        incomplete = self.incomplete(group)
        return frozenset(name for name, fields in STATISTICS.items() if incomplete.intersection(fields))

    def require(self, group: str, fields: Iterable[str]) -> None:
        """Raises PatchError, naming what is missing, unless sums of a group have all of its tokens."""
        lacking = self.incomplete(group).intersection(fields)
        if lacking:
            names = (name for name, made_of in STATISTICS.items() if lacking.intersection(made_of))
            raise PatchError(f"of group {group!r}, {_not_recorded(*names)}")

    def allocate_gradients(self) -> None:
        """Makes room for the statistics of a·∂L/∂a."""
        if self.gradient_values is None:
            groups, _, units = self.values.shape
            self.gradient_values = self.values.new_zeros(groups, len(GRADIENT_FIELDS), units)

    def allocate_record_sums(self, *names: str) -> None:
        """Makes room for sums over records, [groups, units] each."""
        groups, _, units = self.values.shape
        for name in names:
            self.record_sums.setdefault(name, self.values.new_zeros(groups, units))

    def add_records(self, name: str, units: slice, values: Tensor, groups: Tensor) -> None:
        """Adds what was measured of single records to a sum over those of each group.

        Args:
            name: of the sum, see ``allocate_record_sums``.
            units: the range of units that was measured.
            values: [records, units] float64, on any device.
            groups: [records] int64, the group of each record.
        """
        numbers = torch.arange(1, len(self.groups) + 1, device=values.device)
        members = (groups.to(values.device) == numbers[:, None]).to(values)
        self.record_sums[name][:, units] += (members @ values).to(self.values.device)

    def keep_scores(self, criterion: str | None, backend: str | None = None) -> None:
        """Has whatever adds to the accumulators from now on write the scores as well, or, with None, no longer.

        Args:
            criterion: one of ``ops.CRITERIA_OPS``.
            backend: forces one.
        """
        if criterion is None:
            self.live = None
        elif self.live is None or self.live.criterion != criterion:
            self.live = LiveScores(criterion, self._score(criterion, backend), True, int(self.skipped))
        else:
            self.scores(criterion, backend)

    def scores(self, criterion: str, backend: str | None = None) -> Tensor:
        """Returns the scores of all units by a closed form, NaN where no token was counted.

        Those that were written while recording, where they are valid; otherwise they are computed, in one launch.

        Args:
            criterion: one of ``ops.CRITERIA_OPS``.
            backend: forces one.

        Returns:
            [units] float32.
        """
        live = self.live
        if live is None or live.criterion != criterion:
            return self._score(criterion, backend)
        skipped = int(self.skipped)
        if not live.fresh or live.skipped != skipped:
            live.values.copy_(self._score(criterion, backend))
            live.fresh, live.skipped = True, skipped
        return live.values.clone()

    def _score(self, criterion: str, backend: str | None) -> Tensor:
        for name in self.groups[:2]:
            self.require(name, CLOSED_FORMS[criterion].fields)
        gradients = self.gradient_values if CLOSED_FORMS[criterion].gradients else None
        offsets = self.offsets.to(self.values.device)
        return conflict_score(
            self.values, self.count, offsets, criterion, gradient_statistics=gradients, backend=backend
        )

    def mark_stale(self) -> None:
        """Has the live scores computed anew when they are read next: something was changed without writing them."""
        if self.live is not None:
            self.live.fresh = False

    def number(self, site: Site) -> int:
        """Returns the place of a site among the sites. Raises PatchError if it is none of them."""
        if site not in self._numbers:
            raise PatchError(f"{site.name} is none of the {len(self.sites)} sites of these statistics")
        return self._numbers[site]

    def units(self, site: Site) -> slice:
        """Returns the range of a site's units in the last dimension of the accumulators."""
        number = self.number(site)
        return slice(int(self.offsets[number]), int(self.offsets[number + 1]))

    def tensors(self) -> list[Tensor]:
        """Returns everything that recording adds to."""
        gradients = [] if self.gradient_values is None else [self.gradient_values]
        record_sums = [self.record_sums[name] for name in sorted(self.record_sums)]
        return [self.values, self.count, self.nonfinite, self.records, *record_sums, *gradients]

    def of(self, site: Site, group: str) -> UnitStatistics:
        """Returns the statistics of one site and group.

        Raises:
            PatchError: the group was never recorded, or none of its tokens reached the site.
            NonFiniteError: an activation or gradient was NaN or infinite.
        """
        if group not in self.groups:
            raise PatchError(f"group {group!r} was never recorded; recorded are: {', '.join(self.groups)}")
        row, units = self.groups.index(group), self.units(site)
        count = int(self.count[row, self.number(site)])
        if count == 0:
            raise PatchError(f"no token of group {group!r} was recorded at {site.name}; record it first")
        self._check_finite(site)
        total, square, magnitude, maximum, active = self.values[row, :, units]
        mean = total / count
        # The squares of single tokens were rounded to float32, so that of one token alone is not that of its mean.
        variance = (square / count - mean.square()).clamp_min(0.0) if count > 1 else torch.zeros_like(mean)
        gradients = (
            {}
            if self.gradient_values is None
            else dict(
                zip(
                    ("attribution", "abs_attribution", "square_attribution"),
                    self.gradient_values[row, :, units] / count,
                    strict=True,
                )
            )
        )
        return UnitStatistics(
            count=count,
            mean=mean,
            variance=variance,
            abs_mean=magnitude / count,
            max_abs=maximum.clone(),
            active_fraction=active / count,
            left_out=self.left_out(group),
            **gradients,
        )

    def _check_finite(self, site: Site) -> None:
        units = self.units(site)
        sums = [self.values[..., units], *(record_sums[..., units] for record_sums in self.record_sums.values())]
        sums += [] if self.gradient_values is None else [self.gradient_values[..., units]]
        if not all(bool(torch.isfinite(tensor).all()) for tensor in sums):
            raise NonFiniteError(
                f"NaN or infinite activations at {site.name}; check the weights and the precision of the model, "
                "then record anew"
            )

    def check_finite(self) -> None:
        """Raises NonFiniteError naming the sites where an activation or gradient was NaN or infinite."""
        sums = self.values.sum(dim=(0, 1))
        if self.gradient_values is not None:
            sums = sums + self.gradient_values.sum(dim=(0, 1))
        for record_sums in self.record_sums.values():
            sums = sums + record_sums.sum(dim=0)
        if bool(torch.isfinite(sums).all()):
            return
        bad = [site.name for site in self.sites if not bool(torch.isfinite(sums[self.units(site)]).all())]
        raise NonFiniteError(
            f"NaN or infinite activations at {len(bad)} of {len(self.sites)} sites, first {bad[0]}; "
            "check the weights and the precision of the model, then record anew"
        )

    def reset(self) -> None:
        """Forgets everything recorded so far."""
        self.mark_stale()
        for tensor in (*self.tensors(), self.skipped):
            tensor.zero_()
        fields, _ = self._leaving_out
        self._incomplete, self._leaving_out = {}, (fields, self.count.clone() if fields else self.count)

    def empty(self, device: torch.device | None = None) -> Statistics:
        """Returns statistics of the same sites and groups in which nothing is recorded, here or on another device."""
        return Statistics(self.sites, self.fingerprint, self.groups, device or self.values.device)

    def regroup(self, members: Tensor, groups: Sequence[str] = DEFAULT_GROUPS) -> Statistics:
        """Returns statistics of groups that are put together from these; what is in none of them is left out.

        Args:
            members: [new groups, groups] bool, which of these groups make up each new one.
            groups: names of the new ones.
        """
        found = Statistics(self.sites, self.fingerprint, groups, self.values.device)
        members = members.to(self.values.device)
        rows = [torch.nonzero(own).flatten() for own in members]

        def put_together(sums: Tensor) -> Tensor:
            return torch.stack([sums[own].sum(0) for own in rows])

        found.values = put_together(self.values)
        for row, own in enumerate(rows):
            if len(own):
                found.values[row, _MAXIMUM] = self.values[own, _MAXIMUM].amax(0)
        found.count, found.nonfinite = put_together(self.count), put_together(self.nonfinite)
        found.records, found.skipped = put_together(self.records), self.skipped.clone()
        found.record_sums = {name: put_together(sums) for name, sums in self.record_sums.items()}
        if self.gradient_values is not None:
            found.gradient_values = put_together(self.gradient_values)
        incomplete = [self.incomplete(name) for name in self.groups]
        found._incomplete = {
            name: frozenset().union(*(incomplete[int(row)] for row in own))
            for name, own in zip(found.groups, rows, strict=True)
        }
        return found

    def merge(self, other: Statistics) -> Statistics:
        """Returns the statistics of both recordings together.

        Raises:
            SelectionError: the other statistics belong to another model.
        """
        merged = self.empty()
        merged.add(self)
        merged.add(other)
        return merged

    def add(self, other: Statistics) -> None:
        """Adds those of another recording of the same model to these.

        Raises:
            SelectionError: the other statistics belong to another model.
        """
        if other.fingerprint != self.fingerprint or other.sites != self.sites:
            raise SelectionError(
                f"statistics of model {other.fingerprint} cannot be merged into those of {self.fingerprint}; "
                "record both on one model"
            )
        self.mark_stale()
        if other.gradient_values is not None:
            self.allocate_gradients()
        self.allocate_record_sums(*other.record_sums)
        rows = [self.group_index(name) - 1 for name in other.groups]
        for row, values in zip(rows, other.values.to(self.values.device), strict=True):
            maximum = torch.maximum(self.values[row, _MAXIMUM], values[_MAXIMUM])
            self.values[row] += values
            self.values[row, _MAXIMUM] = maximum
        for name in other.groups:
            self._incomplete[name] = self._incomplete.get(name, frozenset()) | other.incomplete(name)
        self.count[rows] += other.count.to(self.count)
        self.nonfinite[rows] += other.nonfinite.to(self.count)
        self.skipped += other.skipped.to(self.count)
        self.records[rows] += other.records.to(self.count)
        for name, sums in other.record_sums.items():
            self.record_sums[name][rows] += sums.to(self.values)
        if other.gradient_values is not None and self.gradient_values is not None:
            self.gradient_values[rows] += other.gradient_values.to(self.gradient_values)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Adds up the statistics of all ranks of a process group, in place and on every rank, in the order of ranks.

        Every rank must have recorded the same model with the same groups.

        Args:
            group: default the whole world.

        Raises:
            SelectionError: the ranks hold statistics of different models or groups; on every rank.
        """
        mine = {"fingerprint": self.fingerprint, "groups": self.groups, "sites": len(self.sites)}
        mine |= {"gradients": self.gradient_values is not None, "record_sums": sorted(self.record_sums)}
        mine |= {"incomplete": {name: self.incomplete(name) for name in self.groups}}
        ranks: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(ranks, mine, group=group)
        incomplete = [theirs.pop("incomplete") for theirs in ranks]
        for rank, theirs in enumerate(ranks):
            if theirs != ranks[0]:
                raise SelectionError(f"rank 0 holds statistics of {ranks[0]}, rank {rank} of {theirs}; record the same")
        self.mark_stale()
        self._incomplete = {name: frozenset().union(*(theirs[name] for theirs in incomplete)) for name in self.groups}
        for tensor in (*self.tensors(), self.skipped):
            # Row by row, so that no rank needs room for all the others at once.
            for row in tensor if tensor.dim() else [tensor]:
                parts = [torch.empty_like(row) for _ in ranks]
                dist.all_gather(parts, row.contiguous(), group=group)
                row.copy_(sum(parts[1:], start=parts[0]))
                if tensor is self.values:
                    row[_MAXIMUM] = torch.stack([part[_MAXIMUM] for part in parts]).amax(0)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the accumulators to a safetensors file, atomically."""
        tensors = {"values": self.values, "count": self.count, "nonfinite": self.nonfinite, "skipped": self.skipped}
        tensors |= {"records": self.records} | {f"record_sums.{name}": s for name, s in self.record_sums.items()}
        if self.gradient_values is not None:
            tensors["gradient_values"] = self.gradient_values
        header = {
            "sites": [site.as_dict() for site in self.sites],
            "groups": self.groups,
            "fingerprint": self.fingerprint,
            "incomplete": {name: sorted(self.incomplete(name)) for name in self.groups},
        }
        save_tensors(path, "statistics", tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what ``save`` wrote.

        Raises:
            FileFormatError: the file is damaged or holds no statistics.
        """
        tensors, header = load_tensors(path, "statistics")
        try:
            sites = [Site.from_dict(fields) for fields in header["sites"]]
            statistics = cls(sites, header["fingerprint"], header["groups"])
            if "gradient_values" in tensors:
                statistics.allocate_gradients()
                statistics.gradient_values = tensors["gradient_values"]
            for name in ("values", "count", "nonfinite", "skipped", "records"):
                if tensors[name].shape != getattr(statistics, name).shape:
                    raise FileFormatError(f"{path} has {name} of another shape than its header says; make it again")
                setattr(statistics, name, tensors[name])
            incomplete = header.get("incomplete", {})
            statistics._incomplete = {name: frozenset(fields) for name, fields in incomplete.items()}
            prefix = "record_sums."
            statistics.record_sums = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} holds no complete statistics (missing {error}); make it again") from error
        return statistics

    def __repr__(self) -> str:
        counts = {name: int(self.count[row].max()) for row, name in enumerate(self.groups)}
        return f"Statistics({len(self.sites)} sites, {int(self.offsets[-1])} units, tokens {counts})"


def _with_row(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
