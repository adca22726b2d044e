"""How much memory a training of selected units takes, before anything of it is allocated.

The model is copied without its data, made sparse, and run forward and backward on tensors that have shapes only, while
every allocation that would be made is counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.data import answer_mask, head_of
from clue_fast.deprecated import RenamedAttribute, precision, renamed_arguments
from clue_fast.errors import SparseError
from clue_fast.internals import DataDependentOutputException, DynamicOutputShapeException, storage_of
from clue_fast.objectives import Batch
from clue_fast.objectives.base import join, run
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
            batch}``, which are run in one pass.
        master_weights: see ``SparseAdamW``.

    Raises:
        SparseError: the model is sparse already, a selected layer cannot train in parts, or what is allocated
            depends on the data.
    """
    if next(trainable_slices(model), None) is not None:
        raise SparseError("the model is sparse already; estimate before sparsify, or restore() it first")
    batches = [batch] if "labels" in batch else list(batch.values())
    joined = join(batches)  # type: ignore[arg-type]
    counted, planned = _positions(model, joined), plan(selection)
    with fused(model), without_data() as mode:
        shadow = copy_without_data(model)
        inject(shadow, planned)
        inputs: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in joined.items()}
        kept = [*shadow.parameters(), *shadow.buffers(), *(t for one in planned for t in (one.original, one.index))]
        with Trace([*kept, *inputs.values(), counted]) as trace:
            try:
                loss = _loss(shadow, inputs, counted)
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
    constant = {
        "weights": sum(size for _, size in {(storage_of(t), t.untyped_storage().nbytes()) for t in tensors}),
        "values": 4 * selected if master_weights else 4 * len(slices),
        "original": sum(trained.original.nbytes for trained in slices),
        "optimizer_state": 8 * selected,
    }
    return MemoryEstimate(
        **constant, gradients=4 * selected, activations=activations, peak=sum(constant.values()) + transient
    )


def _positions(model: nn.Module, batch: Batch) -> Tensor:
    """Places in the flattened logits of the positions that predict a label, int64."""
    labels = batch["labels"]
    return torch.nonzero(answer_mask(labels, head_of(model, labels)).flatten()).flatten()


def _loss(model: nn.Module, inputs: dict[str, Tensor], counted: Tensor) -> Tensor:
    logits: Tensor = run(model, inputs).logits
    chosen = logits.flatten(0, -2)[counted].float()
    return functional.cross_entropy(chosen, counted.remainder(logits.shape[-1]))
