"""One step of a training, run on shapes: what it keeps, what there is at most, and how many operations it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.errors import ModelError
from clue_fast.objectives import Objective, predict
from clue_fast.planning.depth import Depth
from clue_fast.planning.methods import Method, Prepared, Trained
from clue_fast.sparse.lower_layers import LowerLayers
from clue_fast.trainer.tracing import Interval, Trace


@dataclass(frozen=True)
class Records:
    """Records of one length.

    Attributes:
        number: how many.
        tokens: of each.
        answer: how many of them, at the end, are its answer.
    """

    number: int
    tokens: int
    answer: int

    @property
    def predicted(self) -> int:
        """How many tokens of a record have another before them that predicts them."""
        return min(self.answer, self.tokens - 1)

    def batch(self) -> dict[str, Tensor]:
        """Them as inputs of a model. The values say nothing; inside of ``without_data`` there are none."""
        shape = (self.number, self.tokens)
        labels = torch.zeros(shape, dtype=torch.int64, device="cpu")
        labels[:, : self.tokens - self.answer] = -100
        ids, mask = (make(shape, dtype=torch.int64, device="cpu") for make in (torch.zeros, torch.ones))
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class Step:
    """A step of the whole model.

    Attributes:
        original: the pass over the original model, where the objective asks it.
        forward, backward: the passes that train.
        trained: what trains, in the reduced model.
        depth: of the model.
        logits: the most bytes, at once, that are as wide as the vocabulary.
        lower: how many of the layers that stand for all are below the lowest one that trains.
        lower_output: bytes that the last of them puts out for one record, where later epochs may begin behind it.
        original_output: bytes that are needed of what the original model says, of one record, by the names of the sets.
    """

    original: tuple[Interval, ...]
    forward: tuple[Interval, ...]
    backward: tuple[Interval, ...]
    trained: tuple[Trained, ...]
    depth: Depth
    logits: int
    lower: int
    lower_output: int
    original_output: Mapping[str, int]

    @property
    def lowest(self) -> int:
        """Number of the lowest layer that trains."""
        return self.depth.kept[self.lower] if self.lower else 0

    @property
    def activations(self) -> int:
        """Bytes that are kept for the backward pass."""
        return sum(interval.change for interval in (*self.original, *self.forward))

    @property
    def forward_flop(self) -> int:
        """Operations of all forward passes."""
        return sum(interval.flop for interval in (*self.original, *self.forward))

    def later_forward_flop(self, lower_known: bool, asked: float) -> int:
        """Operations of the forward passes over records that have been met before.

        Args:
            lower_known: whether what the lower layers put out is kept, so that they are skipped.
            asked: share of the records that the original model is asked about again.
        """
        skipped = [i.flop for i in self.forward if lower_known and i.layer is not None and i.layer < self.lower]
        original = sum(interval.flop for interval in self.original)
        return self.forward_flop - sum(skipped) - original + round(asked * original)

    @property
    def backward_flop(self) -> int:
        """Operations of the backward pass, with what checkpointing runs again."""
        return sum(interval.flop for interval in self.backward)

    def bytes_of(self, kind: str) -> int:
        """Bytes of values, original, gradient or state in the whole model."""
        return self.depth.total((one.path, one.numbers * getattr(one, kind)) for one in self.trained)

    def gradients_by_layer(self) -> Mapping[int | None, int]:
        """Bytes of the gradients of each layer that stands for others, and of what is in no layer."""
        found: dict[int | None, int] = {}
        for one in self.trained:
            place = self.depth.layer_of(one.path)
            found[place] = found.get(place, 0) + one.numbers * one.gradient
        return found


def trace_step(
    model: nn.Module, depth: Depth, method: Method, objective: Objective, sets: Mapping[str, Records]
) -> Step:
    """Runs a step on shapes.

    Args:
        model: on the meta device, of the layers that stand for all.
        depth: which they are.
        method: how it trains.
        objective: of likelihoods.
        sets: by the names of the objective; of one length.

    Raises:
        ModelError: what the model computes depends on its data.
    """
    some = next(iter(sets.values()))
    with method.prepare(model) as prepared:
        inner = prepared.model
        inputs = {name: records.batch() for name, records in sets.items()}
        known = [*inner.parameters(), *inner.buffers(), *prepared.kept]
        known += [tensor for own in inputs.values() for tensor in own.values()]
        trace = Trace(known, vocabulary_of(model), (some.predicted, some.tokens))
        lower = LowerLayers(inner, (one.path for one in prepared.trained))
        seeing: AbstractContextManager[list[Tensor]]
        seeing = lower.watching() if lower.skippable(inner) else nullcontext([])
        # From the second pass on is known what comes behind the head.
        with torch.no_grad(), Trace([], counted=(some.predicted, some.tokens)):
            with seeing as outputs:
                found = predict(inner, inputs)
            asked_of = {name: found[name] for name in objective.original_batches if name in found}
            kept = {name: objective.reference_outputs(own).nbytes for name, own in asked_of.items()}
        records = sum(own.number for own in sets.values())
        lower_output = sum(output.nbytes for output in outputs) // records
        del found, asked_of, outputs
        asked = _Original(trace, prepared)
        with trace, trace.by_layer(depth.layers(inner)):
            try:
                loss, logs = objective.loss(inner, inputs, asked)
            except RuntimeError as error:
                raise ModelError(f"a step of {type(model).__name__} cannot be planned: {error}") from error
            del logs
            forward = trace.take()
            torch.autograd.backward(loss)
            del loss
            backward = trace.take()
    passes = (forward[: asked.intervals], forward[asked.intervals :], backward)
    original, forward, backward = (depth.whole(intervals) for intervals in passes)
    return Step(
        tuple(original),
        tuple(forward),
        tuple(backward),
        tuple(prepared.trained),
        depth,
        trace.logits_peak,
        len(lower.layers),
        lower_output,
        {name: size // sets[name].number for name, size in kept.items()},
    )


def vocabulary_of(model: nn.Module) -> int:
    """How many tokens a model can predict."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return int(head.weight.shape[0])


class _Original:
    """What an objective needs to know of a training, see ``clue_fast.objectives.base.Trained``."""

    def __init__(self, trace: Trace, prepared: Prepared) -> None:
        self.trace, self.prepared = trace, prepared
        self.intervals = 0

    @contextmanager
    def original(self) -> Iterator[nn.Module]:
        """Without adapters; what is swapped or copied besides is counted where the plan is made."""
        for adapter in self.prepared.adapters:
            adapter.active = False
        yield self.prepared.model
        for adapter in self.prepared.adapters:
            adapter.active = True
        self.trace.mark()
        self.intervals = len(self.trace.intervals)

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        """All records train all units."""
