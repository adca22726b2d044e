"""How much memory a training of selected units takes, before anything of it is allocated.

The model is copied without its data, made sparse, and run forward and backward on tensors that have shapes only, while
every allocation that would be made is counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from clue_fast.data import answer_mask, head_of
from clue_fast.deprecated import RenamedAttribute, precision, renamed_arguments
from clue_fast.errors import SparseError
from clue_fast.internals import DataDependentOutputException, DynamicOutputShapeException, storage_of
from clue_fast.objectives import Batch
from clue_fast.objectives.passes import join
from clue_fast.objectives.predictions import Predictions, predict_in_one_pass
from clue_fast.selection import Selection
from clue_fast.sparse import TrainableSlice
from clue_fast.sparse.modules import inject
from clue_fast.sparse.slices import plan, trainable_slices
from clue_fast.trainer.sparse_training import fused
from clue_fast.trainer.tracing import Trace, copy_without_data, without_data


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training step takes.

    Attributes:
        weights: parameters and buffers of the model.
        values: float32 values of the selected weights, where they are kept.
        original: the selected weights as they were, for objectives that ask the original model.
        gradients: of the selected weights.
        optimizer_state: moments of the selected weights.
        activations: what the forward pass keeps for the backward pass.
        peak: the most that exists at once: all of the above, and what comes and goes during the backward pass.
    """

    weights: int
    values: int
    original: int
    gradients: int
    optimizer_state: int
    activations: int
    peak: int
    masters = RenamedAttribute("values")

    def __str__(self) -> str:
        return "\n".join(
            f"{name.replace('_', ' '):<16}{size / 2**20:>12,.1f} MiB" for name, size in asdict(self).items()
        )


@renamed_arguments(master=lambda value: {"master_weights": precision(value)["master_weights"]})
def estimate_memory(
    model: nn.Module, selection: Selection, batch: Batch | Mapping[str, Batch], *, master_weights: bool = True
) -> MemoryEstimate:
    """Estimates what a step of an ``UnlearnTrainer`` takes, with AdamW and an objective of likelihoods.

    MLPs count as fused where they will be, as ``patch`` does it. Which tokens an expert is given is not known: all are
    given as many.

    Args:
        model: stays as it is; its weights may be on the meta device, which then counts as the CPU. Gradient
            checkpointing and the mode of training are those of the model.
        selection: made for the model.
        batch: inputs with labels, as many records and tokens as a step will have, or ``{"forget": batch, "retain":
            batch}``, which count as run in one pass, padded to the longest; of passes of similar length, which are run
            backward one by one, a step takes the activations of one.
        master_weights: see ``SparseAdamW``.

    Raises:
        SparseError: the model is sparse already, a selected layer cannot train in parts, or what is allocated
            depends on the data.
    """
    if next(trainable_slices(model), None) is not None:
        raise SparseError("the model is sparse already; estimate before sparsify, or restore() it first")
    batches = [batch] if "labels" in batch else list(batch.values())
    joined = join(batches)  # type: ignore[arg-type]
    labels = [_count(model, own) for own in batches]  # type: ignore[arg-type]
    counted, planned = (sum(labels), joined["labels"].numel()), plan(selection)
    with fused(model), without_data() as mode:
        shadow = copy_without_data(model)
        inject(shadow, planned)
        inputs: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in joined.items()}
        kept = [*shadow.parameters(), *shadow.buffers(), *(t for one in planned for t in (one.original, one.index))]
        with torch.no_grad(), Trace([], counted=counted):
            _loss(shadow, inputs, labels)  # from the second pass on is known what comes behind the head
        with Trace([*kept, *inputs.values()], counted=counted) as trace:
            try:
                loss = _loss(shadow, inputs, labels)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise SparseError(
                    f"what {type(model).__name__} allocates depends on the data ({error.func}); train a step and look "
                    "at trainer.memory"
                ) from None
            activations = trace.live
            loss.backward()
            del loss
    return _estimate(shadow, planned, master_weights, activations, trace.peak)


def _estimate(
    shadow: nn.Module, slices: list[TrainableSlice], master_weights: bool, activations: int, transient: int
) -> MemoryEstimate:
    values = {id(trained.values) for trained in slices}
    tensors = [*(p for p in shadow.parameters() if id(p) not in values), *shadow.buffers()]
    selected = sum(trained.values.numel() for trained in slices)
    copied = sum(trained.values.numel() for trained in slices if trained.original.dtype != torch.float32)
    constant = {
        "weights": sum(size for _, size in {(storage_of(t), t.untyped_storage().nbytes()) for t in tensors}),
        "values": 4 * copied if master_weights else 0,
        "original": sum(trained.original.nbytes for trained in slices),
        "optimizer_state": 8 * selected,
    }
    return MemoryEstimate(
        **constant, gradients=4 * selected, activations=activations, peak=sum(constant.values()) + transient
    )


def _count(model: nn.Module, batch: Batch) -> int:
    """How many positions predict a label."""
    labels = batch["labels"]
    return int(answer_mask(labels, head_of(model, labels)).sum())


def _loss(model: nn.Module, inputs: dict[str, Tensor], labels: Sequence[int]) -> Tensor:
    """The sum of the mean losses of some batches, joined, that have so many labels each."""
    found = predict_in_one_pass(model, inputs)
    sizes = list(labels)
    parts = zip(torch.split(found.states, sizes), torch.split(found.labels, sizes), strict=True)
    return torch.stack([Predictions(*own, found.counted, found.head).losses.mean() for own in parts]).sum()
