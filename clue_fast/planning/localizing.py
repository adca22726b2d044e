"""Localization, run on shapes: the passes that a criterion needs, its statistics, and what it holds besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from clue_fast.criteria.blocks import deal
from clue_fast.criteria.integrated_gradients import INTEGRATED, STEPS
from clue_fast.criteria.passes import differentiable, inference, predictions_of, target_of
from clue_fast.criteria.registry import Criterion
from clue_fast.criteria.weight_gradients import (
    BIAS,
    COLUMNS,
    GRADIENT_BYTES,
    MAGNITUDE,
    OVERLAP,
    PRODUCT,
    ROWS,
    SQUARE,
    WEIGHTED_INPUT,
    chunks,
)
from clue_fast.data import Record
from clue_fast.errors import SettingError
from clue_fast.ops import FIELDS, GRADIENT_FIELDS
from clue_fast.planning.depth import Depth, peak_of
from clue_fast.planning.step import Records, vocabulary_of
from clue_fast.sites import Site, Survey
from clue_fast.sites.projection import projection_of
from clue_fast.trainer.sparse_training import fused
from clue_fast.trainer.tracing import Interval, Trace, copy_without_data, without_data

FLOAT64, FLOAT32 = 8, 4


@dataclass(frozen=True)
class Pass:
    """A forward pass over one batch of a whole model, and the backward pass behind it if there is one.

    Attributes:
        forward, backward: their parts.
        logits: the most bytes, at once, that are as wide as the vocabulary.
    """

    forward: tuple[Interval, ...]
    backward: tuple[Interval, ...] = ()
    logits: int = 0


@dataclass(frozen=True)
class Localization:
    """What it takes to localize.

    Attributes:
        statistics: bytes of the accumulators.
        held: bytes that the criterion holds besides, while it measures.
        activations, logits: bytes that are kept for the backward pass, or are there at most without one; of a batch.
        peak: the most bytes that a batch takes.
        flop: operations over all records.
        passes: runs of the model over all records, forward.
    """

    statistics: int
    held: int
    activations: int
    logits: int
    peak: int
    flop: int
    passes: int


@dataclass(frozen=True)
class Part:
    """What the units of a site own of a linear layer.

    Attributes:
        path: of the layer in the reduced model.
        side: ROWS, COLUMNS or BIAS.
        owned: how many rows or columns.
        inputs, outputs: of the layer.
    """

    path: str
    side: str
    owned: int
    inputs: int
    outputs: int


def statistics_bytes(sites: int, units: int, groups: int, gradients: bool, record_sums: int) -> int:
    """Bytes of ``Statistics``: accumulators of units and sites by group, as they are allocated."""
    fields = len(FIELDS) + (len(GRADIENT_FIELDS) if gradients else 0) + record_sums
    return groups * (fields * units * FLOAT64 + 2 * sites * 8 + 8) + (sites + 1) * 8 + 8


def check_measurement(criterion: Criterion) -> None:
    """Raises SettingError if it is not known before how often a criterion runs the model."""
    if criterion.needs == "circuits":
        raise SettingError(
            f"criterion {criterion.name!r} cannot be planned: how often it runs the model depends on the prompts; plan "
            "'attribution', which ranks the units inside its nodes"
        )


def groups_of(criterion: Criterion, forget: int, retain: int, permutations: int) -> int:
    """How many groups statistics are kept in: the two sets, or the blocks whose labels are exchanged."""
    if not permutations or not criterion.measurement.by_blocks:
        return 2
    records = [[Record("", f"{group} {n}") for n in range(many)] for group, many in enumerate((forget, retain))]
    return len(deal(records[0], records[1], 0))


def trace_localization(
    model: nn.Module,
    depth: Depth,
    found: Survey,
    criterion: Criterion,
    records: Records,
    forget: int,
    retain: int,
    permutations: int,
) -> Localization:
    """Runs the passes of a criterion on shapes.

    Recording adds its statistics and what is said in ``held``, and nothing of the size of an activation.

    Args:
        model: on the meta device, of the layers that stand for all.
        depth: which they are.
        found: the sites of that model.
        criterion: whose needs are measured.
        records: of one batch.
        forget, retain: how many records there are in all.
        permutations: see ``LocalizeConfig``.

    Raises:
        SettingError: the criterion looks at weights of units, and those of a site are in no linear layer.
    """
    sites, needs = found.sites, criterion.needs
    groups = groups_of(criterion, forget, retain, permutations)
    measurement = criterion.measurement
    units = depth.total((site.path, site.width) for site in sites)
    number = depth.total((site.path, 1) for site in sites)
    sums = len(_RECORD_SUMS.get(needs, ()))
    statistics = statistics_bytes(number, units, groups, measurement.gradients, sums)
    if measurement.passes == (0, 0):
        return Localization(statistics, 0, 0, 0, 0, 0, 0)
    parts = _parts(model, sites, criterion) if needs in _RECORD_SUMS else []
    run = _run(model, found, depth, records, measurement.passes[1] > 0)
    batches = (forget + retain) / records.number
    forward, backward = (sum(interval.flop for interval in part) for part in (run.forward, run.backward))
    once, passes, held, at_the_end = forward + backward, 1, 0, 0
    if needs == "weight_inputs":
        layers = {part.path: part.inputs + 1 for part in parts if part.side != BIAS}
        held = groups * FLOAT64 * depth.total(layers.items())
        rows = ((part.path, part.inputs * part.outputs) for part in parts if part.side == ROWS)
        at_the_end = 2 * groups * depth.total(rows)
    elif needs == "squared_gradients":
        once += depth.total((part.path, _squares(part, parts, records)) for part in parts)
    elif needs == "mean_gradients":
        weights = {part.path: prod((part.inputs, part.outputs)) for part in parts}
        whole = 2 * FLOAT32 * depth.total(weights.items())
        passes = _chunks(depth, weights)
        held = min(whole, GRADIENT_BYTES)
        once = passes * once + depth.total(
            (path, 2 * records.number * records.tokens * n) for path, n in weights.items()
        )
    elif needs == "integrated_gradients":
        once, passes = _integrated(run, depth, parts, records)
    kept = sum(interval.change for interval in run.forward)
    peak = peak_of([*run.forward, *run.backward])
    return Localization(
        statistics=statistics,
        held=held,
        activations=kept if run.backward else peak,
        logits=run.logits,
        peak=peak,
        flop=round(once * batches) + at_the_end,
        passes=passes,
    )


_RECORD_SUMS: dict[str, tuple[str, ...]] = {
    "weight_inputs": (WEIGHTED_INPUT,),
    "squared_gradients": (SQUARE,),
    "mean_gradients": (PRODUCT, MAGNITUDE, OVERLAP),
    "integrated_gradients": (INTEGRATED,),
}
"""What measurements that look at the weights of units add up over records."""


def _run(model: nn.Module, found: Survey, depth: Depth, records: Records, backward: bool) -> Pass:
    """One batch through the layers, or through the whole model and back to its embeddings."""
    with fused(model, found), without_data():
        inner, inputs = copy_without_data(model), records.batch()
        known = [*inner.parameters(), *inner.buffers(), *inputs.values()]
        counted = records.predicted, records.tokens
        if backward:  # from the second pass on is known what comes behind the head
            with inference(inner), Trace([], counted=counted):
                predictions_of(inner, inputs)
        trace = Trace(known, vocabulary_of(model), counted)
        with inference(inner), trace, trace.by_layer(depth.layers(inner)):
            if not backward:
                with torch.no_grad():
                    output = _layers(inner)(
                        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
                    )
                    del output
                return Pass(tuple(depth.whole(trace.take())))
            with differentiable(inner, found.sites):
                values = target_of(predictions_of(inner, inputs), "log_odds").sum()
            forward = depth.whole(trace.take())
            torch.autograd.backward(values)
            del values
            return Pass(tuple(forward), tuple(depth.whole(trace.take())), trace.logits_peak)


def _layers(model: nn.Module) -> Callable[..., object]:
    layers: Callable[..., object] = getattr(model, "base_model", model)
    return layers


def _parts(model: nn.Module, sites: Sequence[Site], criterion: Criterion) -> list[Part]:
    """What the units own of linear layers. Raises SettingError where it is of something else."""
    found = []
    for site in sites:
        for owned in site.slices:
            path, _, name = owned.parameter.rpartition(".")
            projection = projection_of(model.get_submodule(path), path)
            if projection is None or owned.expert_index is not None or name not in ("weight", "bias"):
                raise SettingError(
                    f"criterion {criterion.name!r} looks at the weights of single units, and those of {site.name} are "
                    "in no linear layer; plan 'attribution' or 'difference'"
                )
            side = BIAS if name == "bias" else ROWS if owned.dim == projection.output_dim else COLUMNS
            found.append(Part(path, side, site.width * owned.size, projection.inputs, projection.outputs))
    return found


def _squares(part: Part, parts: list[Part], records: Records) -> int:
    """Operations of |g|² of the units' weights, of one batch: a Gram matrix of the tokens, and its product."""
    if part.side == BIAS:
        return 0
    pairs = 2 * records.number * records.tokens**2
    same = [other for other in parts if (other.path, other.side) == (part.path, part.side)]
    gram = part.inputs if part.side == ROWS else part.outputs
    return pairs * (part.owned + (gram if part is same[0] else 0))


def _chunks(depth: Depth, weights: dict[str, int]) -> int:
    """How many passes it takes where the gradients of both sets are held of so many weights at once."""
    sizes = (
        (path, 2 * FLOAT32 * numbers)
        for place in (*depth.stands_in, None)
        for path, numbers in weights.items()
        if depth.layer_of(path) == place
    )
    return sum(1 for _ in chunks(sizes, GRADIENT_BYTES))


def _integrated(found: Pass, depth: Depth, parts: list[Part], records: Records) -> tuple[int, int]:
    """Operations of one batch and runs of the model: for each layer that reads units, ``STEPS`` forward passes and as
    many backward ones that end there.
    """
    forward = sum(interval.flop for interval in found.forward)
    above = flop = runs = 0
    reading = {part.path: part for part in parts if part.side == COLUMNS}.values()
    for interval in found.backward:
        for part in reading if interval.layer is not None else ():
            if depth.layer_of(part.path) == interval.layer:
                own = 2 * records.number * records.tokens * part.inputs * part.outputs
                flop += STEPS * (forward + above + own)
                runs += STEPS
        above += interval.flop
    return flop, runs
