"""Bytes on one GPU, of several that share a training: whole models side by side, or parts of every weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod

from torch import nn

from clue_fast.config.planning import DDP, FSDP2
from clue_fast.internals import storage_of
from clue_fast.objectives.original import KEPT_BYTES
from clue_fast.planning.depth import Depth, peak_of
from clue_fast.planning.localizing import Localization
from clue_fast.planning.methods import Method
from clue_fast.planning.step import Step
from clue_fast.trainer.tracing import Interval


@dataclass(frozen=True)
class Weights:
    """Bytes of the weights of a whole model, as one way to train has them.

    Attributes:
        shapes: bytes of a number, and shape, of each parameter; what is tied is there once.
        buffers: bytes of what is no parameter, and stays whole.
        root: bytes of parameters in no layer.
        layers: bytes of the parameters of each layer.
        total: of all.
    """

    shapes: tuple[tuple[int, tuple[int, ...]], ...]
    buffers: int
    root: int
    layers: tuple[int, ...]
    total: int

    @property
    def largest(self) -> int:
        """Bytes of the parameters of the largest layer."""
        return max(self.layers, default=0)

    def sharded(self, gpus: int) -> int:
        """Bytes on one GPU if each weight is cut along its first dimension, and filled up to parts of one size."""
        return self.buffers + sum(size * -(-first // gpus) * prod(rest) for size, (first, *rest) in self.shapes)


def weights_of(model: nn.Module, depth: Depth, method: Method | None = None) -> Weights:
    """Counts the weights of a whole model on the meta device."""
    layers: dict[int | None, int] = {}
    shapes = []
    for path, parameter in model.named_parameters():
        size = parameter.nbytes if method is None else method.weight_bytes(parameter)
        place = depth.layer_of(path)
        layers[place] = layers.get(place, 0) + size
        shapes.append((size // max(1, parameter.numel()), tuple(parameter.shape) or (1,)))
    buffers = sum(buffer.nbytes for buffer in {storage_of(b): b for b in model.buffers()}.values())
    root = layers.pop(None, 0)
    by_number = tuple(layers.get(number, 0) for number in range(len(depth.stands_in)))
    return Weights(tuple(shapes), buffers, root, by_number, buffers + root + sum(by_number))


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU.

    Attributes:
        weights: of the model, or the part of them that this GPU has.
        reference: a copy of the original model.
        values, original: of the selected weights: in float32, and as they were; or of adapters.
        gradients, optimizer_state: of what trains.
        lower_layers: what the layers below the lowest one that trains have put out, of all records.
        original_outputs: what is needed of the original model's outputs, of all records.
        statistics: accumulators, and what a criterion holds besides.
        communication: buckets of gradients; or the weights of layers that are whole for the moment.
        activations: what the forward pass keeps for the backward pass; without one, the most of a forward pass.
        logits: the most bytes, at once, that are as wide as the vocabulary.
        peak: the most bytes there are at once. Less than the sum: gradients come when logits are gone.
    """

    weights: int
    reference: int = 0
    values: int = 0
    original: int = 0
    gradients: int = 0
    optimizer_state: int = 0
    lower_layers: int = 0
    original_outputs: int = 0
    statistics: int = 0
    communication: int = 0
    activations: int = 0
    logits: int = 0
    peak: int = 0

    def as_dict(self) -> dict[str, int]:
        """The bytes by name."""
        return asdict(self)


@dataclass(frozen=True)
class Kept:
    """What a training of selected units keeps of its records from the first epoch on.

    Attributes:
        lower_layers, original_outputs: bytes, see ``Footprint``.
        lower_known: whether that is what the lower layers put out for every record.
        asked: share of the records whose original outputs have no room.
    """

    lower_layers: int = 0
    original_outputs: int = 0
    lower_known: bool = False
    asked: float = 1.0


def kept_of(step: Step, records: Mapping[str, int], most_bytes: int) -> Kept:
    """What is kept of all records.

    Args:
        step: of one GPU's batch.
        records: how many there are in all, by the names of the sets in the step.
        most_bytes: of what lower layers put out.
    """
    number = sum(records.values())
    fitting = min(number, most_bytes // step.lower_output) if step.lower_output else 0
    needed = sum(size * records[name] for name, size in step.original_output.items())
    some = min(needed, KEPT_BYTES)
    return Kept(
        lower_layers=fitting * step.lower_output,
        original_outputs=some,
        lower_known=fitting == number,
        asked=1 - some / needed if needed else 0.0,
    )


def training_footprint(
    step: Step,
    weights: Weights,
    frozen: Weights,
    gpus: int,
    parallel: str,
    asks_original: bool,
    copies: bool,
    narrow: int = 1,
    kept: Kept | None = None,
) -> Footprint:
    """Bytes on one GPU while it trains.

    Args:
        step: of one GPU's batch.
        weights: as the training has them.
        frozen: as a copy of the original model has them.
        gpus: how many.
        parallel: "ddp" or "fsdp2".
        asks_original: whether the objective asks the original model.
        copies: whether the training needs a copy of it.
        narrow: how many times as many bytes the parts of weights and gradients have as those that are whole for the
            moment, with FSDP2.
        kept: of records, from the first epoch on; None for nothing.
    """
    kept = kept or Kept()
    sharded = parallel == FSDP2 and gpus > 1
    share = gpus if sharded else 1
    trained = {kind: -(-step.bytes_of(kind) // share) for kind in ("values", "original", "gradient", "state")}
    reference = (frozen.sharded(share) if sharded else frozen.total) if asks_original and copies else 0
    own = weights.sharded(share) if sharded else weights.total
    gradients = step.gradients_by_layer()
    buckets = step.bytes_of("gradient") if gpus > 1 else 0
    communication = (weights.root + 2 * weights.largest) // narrow if sharded else buckets

    def given_away(interval: Interval) -> int:
        """Of the gradients of a layer, which are whole until it ends, all but this GPU's part."""
        kept = gradients.get(interval.layer, 0)
        return kept // narrow - kept // share if sharded and interval.layer is not None else 0

    constant = own + reference + trained["values"] + trained["original"] + trained["state"] + communication
    constant += kept.lower_layers + kept.original_outputs
    swapped = trained["original"] if asks_original else 0
    run = [*step.original, *step.forward, *step.backward]
    backward = {id(interval) for interval in step.backward}
    peak = max(
        peak_of(run, lambda interval: given_away(interval) if id(interval) in backward else 0),
        swapped + peak_of(step.original),
    )
    return Footprint(
        weights=own,
        reference=reference,
        values=trained["values"],
        original=trained["original"],
        gradients=trained["gradient"],
        optimizer_state=trained["state"],
        lower_layers=kept.lower_layers,
        original_outputs=kept.original_outputs,
        communication=communication,
        activations=step.activations,
        logits=step.logits,
        peak=constant + peak,
    )


def localization_footprint(found: Localization, weights: Weights, gpus: int, parallel: str) -> Footprint:
    """Bytes on one GPU while it records its share of the data."""
    sharded = parallel == FSDP2 and gpus > 1
    own = weights.sharded(gpus) if sharded else weights.total
    communication = weights.root + 2 * weights.largest if sharded else 0
    statistics = found.statistics + found.held
    return Footprint(
        weights=own,
        statistics=statistics,
        communication=communication,
        activations=found.activations,
        logits=found.logits,
        peak=own + communication + statistics + found.peak,
    )


def sent(step: Step, weights: Weights, gpus: int, parallel: str, narrow: int = 1) -> int:
    """Bytes that each GPU sends in a step: gradients around a ring, or weights twice and gradients once.

    The weights of layers that no backward pass runs through are sent once. For ``narrow`` see ``training_footprint``.
    """
    if gpus == 1:
        return 0
    gradients = step.bytes_of("gradient")
    if parallel == DDP:
        return 2 * (gpus - 1) * gradients // gpus
    twice = 2 * weights.total - sum(weights.layers[: step.lowest])
    return (gpus - 1) * (twice + gradients) // (gpus * narrow)
