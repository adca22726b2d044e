"""What the original model says of the records of a step: asked once for each record, and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clue_fast.data import head_of
from clue_fast.internals import has_no_data
from clue_fast.objectives.passes import predict
from clue_fast.objectives.predictions import Batch, Predictions
from clue_fast.sites import evaluation_mode

KEPT_BYTES = 256 * 2**20
"""Of what the original model says, for all records together; the others are asked anew whenever they come."""

Kept: TypeAlias = "MutableMapping[Hashable, Tensor]"


class Trained(Protocol):
    """What an objective needs to know of the training: ``Sparse`` is one.

    It may have ``original_outputs`` too, a dict for what the original model says of each record, as long as that does
    not change; ``lower_layers``, which says of a step what stands around each pass that trains; ``backward_by_pass``,
    whether each pass may be run backward as soon as it ran forward; and ``packed_tokens``, of a row of records.
    """

    def original(self) -> AbstractContextManager[Any]:
        """The model as it was before training, for as long as the context lasts."""

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        """Says that in the next pass the first ``forget`` of all ``records`` are to be forgotten."""


def original_outputs(
    model: nn.Module,
    batches: Mapping[str, Batch],
    trained: Trained,
    output: Callable[[Predictions], Tensor],
    asked_by: Hashable,
) -> dict[str, Tensor]:
    """What the original model says of all records of some batches, by the name of the batch.

    Where it is kept, each record is asked by itself, so that the answer depends neither on the records beside it nor
    on where a training was resumed.

    Args:
        model: that trains.
        batches: of records.
        trained: gives the original model.
        output: of its predictions, [labels, ...], what is wanted.
        asked_by: tells what is wanted from what others want of the same records.
    """
    kept: Kept | None = getattr(trained, "original_outputs", None)
    if kept is None or not all(_is_text(model, batch) for batch in batches.values()):
        with torch.no_grad(), trained.original(), evaluation_mode(model):
            return {name: output(own) for name, own in predict(model, batches).items()}
    records = {name: _records(batch) for name, batch in batches.items()}
    keys = {name: [_key(asked_by, own) for own in of_batch] for name, of_batch in records.items()}
    known: dict[Hashable, Tensor] = {}
    missing: dict[Hashable, Batch] = {}
    for name, of_batch in keys.items():
        known |= {key: kept[key] for key in of_batch if key in kept}
        missing |= {key: own for key, own in zip(of_batch, records[name], strict=True) if key not in kept}
    if missing:
        device = next(iter(batches.values()))["labels"].device
        room = KEPT_BYTES - _bytes(kept.values())
        inner = model.module if isinstance(model, DistributedDataParallel) else model  # no other process waits
        with torch.no_grad(), trained.original(), evaluation_mode(model):
            for key, record in missing.items():
                record = {name: tensor.to(device) for name, tensor in record.items()}
                known[key] = output(predict(inner, {"asked": record})["asked"]).clone()
                room -= known[key].nbytes
                if room >= 0:
                    kept[key] = known[key]
    return {name: torch.cat([known[key] for key in of_batch]) for name, of_batch in keys.items()}


def _is_text(model: nn.Module, batch: Batch) -> bool:
    """Whether the records of a batch are tokens and nothing else, each of which may be a label."""
    if set(batch) != {"input_ids", "attention_mask", "labels"} or has_no_data(batch["labels"]):
        return False
    same = batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    return same and head_of(model, batch["labels"]) == "causal"


def _records(batch: Batch) -> list[Batch]:
    """Each record as a batch of its own, without padding, on the CPU: a GPU is waited for once, not for each record."""
    tensors = {name: tensor.cpu() for name, tensor in batch.items()}
    attended = tensors["attention_mask"] != 0
    return [{name: own[row][mask][None] for name, own in tensors.items()} for row, mask in enumerate(attended)]


def _key(asked_by: Hashable, record: Batch) -> Hashable:
    return asked_by, *(tuple(record[name][0].tolist()) for name in ("input_ids", "labels"))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
