"""Runs a model over the batches of a step in one pass, and reads what it says wherever it predicts a label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.errors import DataError, ObjectiveError
from clue_fast.labels import IGNORED_LABEL, answer_mask, head_of, shift_labels
from clue_fast.sites import unwrap

Batch: TypeAlias = "Mapping[str, Tensor]"
"""Inputs of the model, and ``labels``: int64 [records, positions], or [records] for classification."""

# What the tokens that are added to make two batches equally long are filled with; 0 is masked from attention.
_FILL = {"labels": IGNORED_LABEL}


@dataclass(frozen=True)
class Predictions:
    """What a model says where it predicts the labels of a batch of records.

    Attributes:
        logits: [labels, vocabulary] float32, the positions of one record after those of another.
        labels: [labels] int64.
        counted: [records, positions] bool, which positions predict them.
    """

    logits: Tensor
    labels: Tensor
    counted: Tensor

    @cached_property
    def losses(self) -> Tensor:
        """-log p of every label, [labels] float32."""
        return functional.cross_entropy(self.logits, self.labels, reduction="none")

    @property
    def tokens(self) -> Tensor:
        """How many labels a record has, [records] int64."""
        return self.counted.sum(-1)

    def total(self, values: Tensor) -> Tensor:
        """Sums one value a label over each record, [labels] -> [records] float32."""
        return torch.zeros(self.counted.shape, device=values.device).masked_scatter(self.counted, values).sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Averages one value a label over each record; 0 for a record without labels."""
        return self.total(values) / self.tokens.clamp(min=1)


def predict(model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, Predictions]:
    """Runs all batches in one forward pass, and returns the predictions for each by its name."""
    joined = join(list(batches.values()))
    output = run(model, joined)
    labels = joined["labels"]
    logits = getattr(output, "logits", None)
    if logits is None:
        raise ObjectiveError(f"{type(unwrap(model)).__name__} returns no logits; objectives need a head with labels")
    head = head_of(model, labels)
    if head == "classification":
        logits, labels = logits[:, None], labels[:, None]
    if logits.shape[:2] != labels.shape:
        raise ObjectiveError(
            f"{type(unwrap(model)).__name__} gives logits at {list(logits.shape[:2])} positions for "
            f"{list(labels.shape)} labels; expand image or prefix tokens in input_ids first"
        )
    records = [len(batch["labels"]) for batch in batches.values()]
    parts = zip(batches, torch.split(logits, records), torch.split(labels, records), strict=True)
    return {name: _select(own, answers, head) for name, own, answers in parts}


def run(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Runs the model on a batch, without its labels, and returns its output."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    head = head_of(model, batch["labels"])
    if head == "seq2seq" and "decoder_input_ids" not in inputs:
        inner: Any = unwrap(model)
        inputs["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(batch["labels"])
    if head in ("causal", "seq2seq"):
        # Caching keys is of no use here, and not compatible with gradient checkpointing.
        options["use_cache"] = False
    return model(**inputs, **options)


def join(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Stacks batches of records into one, padded on the right to the longest.

    Raises:
        DataError: the batches hold different inputs, or inputs that cannot be padded to one shape.
    """
    if len(batches) == 1:
        return dict(batches[0])
    names = [set(batch) for batch in batches]
    odd = set[str]().union(*names) - names[0].intersection(*names)
    if odd:
        raise DataError(f"{', '.join(sorted(odd))} is an input of some batches only; give all sets the same inputs")
    return {name: _stack(name, [batch[name] for batch in batches]) for name in batches[0]}


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        if any(len(shape) != 1 for shape in shapes):
            raise DataError(f"{name} has the shapes {sorted(shapes)} in the batches of a step; make them equal")
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [functional.pad(t, (0, longest - t.shape[1]), value=_FILL.get(name, 0)) for t in tensors]
    return torch.cat(tensors)


def _select(logits: Tensor, labels: Tensor, head: str) -> Predictions:
    counted = answer_mask(labels, head)
    return Predictions(logits[counted].float(), shift_labels(labels, head)[counted], counted)
