"""What a criterion can need, and how each of it is measured: the table ``MEASUREMENTS``, one row a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.criteria.integrated_gradients import STEPS, IntegratedGradients
from clue_fast.criteria.passes import (
    Batches,
    counted_mask,
    differentiable,
    inference,
    predictions_of,
    target_of,
    token_groups,
)
from clue_fast.criteria.weight_gradients import (
    WEIGHTED_INPUT,
    SquaredGradientRecorder,
    WeightInputRecorder,
    mean_gradient_recorders,
    module_slices,
)
from clue_fast.data import head_of
from clue_fast.recording import Patched, patch
from clue_fast.sites import Survey, device_of, model_fingerprint
from clue_fast.statistics import DEFAULT_GROUPS, Statistics


@dataclass(frozen=True)
class Job:
    """A model and encoded records, over which something is measured.

    Attributes:
        model: with the sites that were found in it.
        found: those sites.
        batches: the records, by group.
        target: what is differentiated where gradients are measured, a key of ``TARGETS``.
        backend: forces a backend of the operators, or None.
        reads: names of the statistics that are taken of units, or None for all, see ``Patched.record``.
    """

    model: nn.Module
    found: Survey
    batches: Batches
    target: str
    backend: str | None = None
    reads: tuple[str, ...] | None = None

    def statistics(self) -> Statistics:
        """Empty statistics of the groups of the batches, on the device of the model."""
        groups, device = self.batches.groups, device_of(self.model)
        return Statistics(self.found.sites, model_fingerprint(self.model), groups, device)


Regrouped = Callable[[Tensor], Mapping[str, Tensor]]
"""From groups put together, [rows, groups] bool, to means over their records by name, each [rows, units] float64."""


@dataclass(frozen=True)
class Recorded:
    """What was measured.

    Attributes:
        statistics: of the groups of the batches.
        regrouped: what is no sum over records, of groups that are put together, or None if everything is one.
    """

    statistics: Statistics
    regrouped: Regrouped | None = None


def record_nothing(job: Job) -> Recorded:
    """Empty statistics, on the CPU: neither model nor data are looked at."""
    return Recorded(Statistics(job.found.sites, model_fingerprint(job.model), job.batches.groups))


def record_activations(job: Job) -> Recorded:
    """Activations where answer tokens are predicted."""
    return _record_patched(job, None)


def record_gradients(job: Job) -> Recorded:
    """Activations where answer tokens are predicted, and a·∂f/∂a."""
    return _record_patched(job, job.target)


def _record_patched(job: Job, target: str | None) -> Recorded:
    with patch(job.model, found=job.found, strict=False, backend=job.backend) as patched:
        for name in job.batches.groups:
            patched.statistics.group_index(name)
        return Recorded(run_patched(patched, job.batches, target, job.reads))


def run_patched(
    patched: Patched, batches: Batches, target: str | None, reads: tuple[str, ...] | None = None
) -> Statistics:
    """Runs a patched model over batches; without a target only its layers, not the language-model head."""
    model = patched.model
    head = head_of(model)
    recording = patched.record(DEFAULT_GROUPS[0], gradients=target is not None, statistics=reads)
    with inference(model), differentiable(model, patched.sites), recording:
        for batch, groups in batches.on(device_of(model)):
            batch["token_group"] = token_groups(batch, groups, head)
            if target is None:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_group")}
                with torch.no_grad():
                    patched.forward_layers(**inputs, use_cache=False)
            else:
                predictions = predictions_of(model, batch, token_group=batch["token_group"])
                torch.autograd.backward(target_of(predictions, target).sum())
    return patched.statistics


def record_weight_inputs(job: Job) -> Recorded:
    """See ``WeightInputRecorder``."""
    model, statistics = job.model, job.statistics()
    layers, head = getattr(model, "base_model", model), head_of(model)
    with inference(model), torch.no_grad(), WeightInputRecorder(model, statistics) as recorder:
        for batch, groups in job.batches.on(device_of(model)):
            recorder.groups = token_groups(batch, groups, head)
            layers(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            recorder.count_records()
    return Recorded(statistics, lambda members: {WEIGHTED_INPUT: recorder.weighted(members)})


def record_squared_gradients(job: Job) -> Recorded:
    """See ``SquaredGradientRecorder``."""
    model, statistics = job.model, job.statistics()
    recording = SquaredGradientRecorder(model, statistics)
    with inference(model), differentiable(model, statistics.sites), recording as recorder:
        for batch, recorder.groups in job.batches.on(device_of(model)):
            predictions = predictions_of(model, batch)
            torch.autograd.backward(predictions.mean(target_of(predictions, job.target)).sum())
            recorder.count_records()
    return Recorded(statistics)


def record_mean_gradients(job: Job) -> Recorded:
    """See ``MeanGradientRecorder``."""
    model, statistics = job.model, job.statistics()
    statistics.records += torch.tensor([len(each) for each in job.batches.data], device=statistics.records.device)
    for recorder in mean_gradient_recorders(model, statistics):
        with inference(model), differentiable(model, statistics.sites), recorder:
            for batch, recorder.groups in job.batches.on(device_of(model)):
                predictions = predictions_of(model, batch)
                torch.autograd.backward(predictions.mean(target_of(predictions, job.target)).sum())
    return Recorded(statistics)


def record_integrated_gradients(job: Job) -> Recorded:
    """See ``IntegratedGradients``."""
    model, statistics, head = job.model, job.statistics(), head_of(job.model)
    integrated = IntegratedGradients(model, statistics)
    with inference(model):
        for batch, groups in job.batches.on(device_of(model)):

            def forward(batch: dict[str, Tensor] = batch) -> Tensor:
                return target_of(predictions_of(model, batch), job.target).sum()

            integrated.add(forward, groups, counted_mask(batch, head))
    return Recorded(statistics)


Check = Callable[[nn.Module, Statistics], object]


def _anything(model: nn.Module, statistics: Statistics) -> None:
    """Every site can be measured."""


@dataclass(frozen=True)
class Measurement:
    """Something that a criterion can need.

    Attributes:
        record: measures it.
        passes: forward and backward passes over each data set that it costs.
        each: of what it costs as many, for the documentation; "" if of the data alone.
        by_blocks: whether it can be measured of many groups in one pass, and put together from them.
        counts: what has to have been counted of a group, "record" or "token".
        live: whether a patched model records it in any pass, as while it trains.
        gradients: whether a·∂f/∂a has to be in the statistics.
        check: raises SiteError where a site of empty statistics cannot be measured, before the model runs.
    """

    record: Callable[[Job], Recorded]
    passes: tuple[int, int]
    each: str = ""
    by_blocks: bool = True
    counts: str = "record"
    live: bool = False
    gradients: bool = False
    check: Check = _anything

    @property
    def cost(self) -> str:
        """The passes in words."""
        forward, backward = self.passes
        return f"{forward} + {backward}{self.each}"


MEASUREMENTS: dict[str, Measurement] = {
    "nothing": Measurement(record_nothing, (0, 0), by_blocks=False),
    "activations": Measurement(record_activations, (1, 0), counts="token", live=True),
    "weight_inputs": Measurement(record_weight_inputs, (1, 0), check=module_slices),
    "gradients": Measurement(record_gradients, (1, 1), counts="token", live=True, gradients=True),
    "squared_gradients": Measurement(record_squared_gradients, (1, 1), check=module_slices),
    "mean_gradients": Measurement(
        record_mean_gradients,
        (1, 1),
        each=" for every 8 GiB of gradients, 8 bytes per weight",
        by_blocks=False,
        check=module_slices,
    ),
    "integrated_gradients": Measurement(
        record_integrated_gradients,
        (1, 1),
        each=f" for each of {STEPS} steps and each layer",
        check=IntegratedGradients,
    ),
}
"""By name, as criteria ask for them."""
