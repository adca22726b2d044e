"""One step of a training, run on shapes: what it keeps, what there is at most, and how many operations it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clue_fast.errors import ModelError
from clue_fast.objectives import Objective, predict
from clue_fast.planning.depth import Depth
from clue_fast.planning.methods import Method, Prepared, Trained
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
    """

    original: tuple[Interval, ...]
    forward: tuple[Interval, ...]
    backward: tuple[Interval, ...]
    trained: tuple[Trained, ...]
    depth: Depth
    logits: int

    @property
    def activations(self) -> int:
        """Bytes that are kept for the backward pass."""
        return sum(interval.change for interval in (*self.original, *self.forward))

    @property
    def forward_flop(self) -> int:
        """Operations of all forward passes."""
        return sum(interval.flop for interval in (*self.original, *self.forward))

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
        # From the second pass on is known what comes behind the head.
        with torch.no_grad(), Trace([], counted=(some.predicted, some.tokens)):
            predict(inner, inputs)
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
