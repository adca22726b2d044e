"""What all objectives share: one forward pass a step, a forget term, a retain term, and the original model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from clue_fast.errors import ObjectiveError
from clue_fast.labels import HEADS, head_of
from clue_fast.training.objectives.predictions import Batch, Predictions, predict

Current = Mapping[str, Predictions]
Original = Mapping[str, Tensor]


class Trained(Protocol):
    """What an objective needs to know of the training: ``Sparse`` is one."""

    def original(self) -> AbstractContextManager[Any]:
        """The model as it was before training, for as long as the context lasts."""

    def reach(self, forget: int, records: int, tokens: int) -> None:
        """Says that in the next pass the first ``forget`` of all ``records`` are to be forgotten."""


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: mean forget term of the records + retain_weight * mean retain term.

    Attributes:
        retain_weight: weight of the retain term; at 0 the retain records are not run at all.
    """

    name: ClassVar[str]
    forget_batches: ClassVar[tuple[str, ...]] = ("forget",)
    """The batches that the forget term reads: "forget", and "alternate" for other answers to the same questions."""
    reference: ClassVar[tuple[str, ...]] = ()
    """The batches on which the original model is asked as well."""
    heads: ClassVar[tuple[str, ...]] = HEADS
    """The heads with which the objective makes sense."""
    retain_weight: float = 1.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """Returns the forget term of each record, [records] float32.

        Args:
            current: predictions of the model as it is, by the name of the batch.
            original: what ``remember`` kept of those of the original model, for the batches in ``reference``.
        """
        raise NotImplementedError

    def retain_term(self, current: Predictions, original: Tensor | None) -> Tensor:
        """Returns the retain term of each record, [records] float32: -log p(x) / |x|."""
        return current.mean(current.losses)

    def remember(self, predictions: Predictions) -> Tensor:
        """Returns what is needed later of the original model's predictions; -log p of every label."""
        return predictions.losses

    def batches(self, batches: Mapping[str, Batch], head: str) -> dict[str, Batch]:
        """Returns the batches that a step runs, those of the forget term first."""
        names = [*self.forget_batches, *(("retain",) if self.retain_weight else ())]
        for name in names:
            if batches.get(name) is None:
                why = f" with a retain_weight of {self.retain_weight}" if name == "retain" else ""
                raise ObjectiveError(f"{self.name}{why} needs {name} records, the step has none")
        return {name: _with_mask(batches[name]) for name in names}

    def loss(
        self, model: nn.Module, batches: Mapping[str, Batch], trained: Trained
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss to run backward, and detached scalars to log.

        Args:
            model: see ``clue_fast.labels`` for its heads.
            batches: "forget" and "retain", and "alternate" for objectives that need it.
            trained: the ``Sparse`` of the model.

        Raises:
            ObjectiveError: the objective makes no sense with the head of the model, or lacks a batch.
        """
        head = head_of(model, batches[self.forget_batches[0]]["labels"])
        self.check_head(model, head)
        used = self.batches(batches, head)
        # The original goes first: swapping weights later would break the graph of the pass that trains.
        original: dict[str, Tensor] = {}
        if self.reference:
            with torch.no_grad(), trained.original(), evaluating(model):
                asked = predict(model, {name: ungrouped(used[name]) for name in self.reference if name in used})
                original = {name: self.remember(predictions) for name, predictions in asked.items()}
        announce(trained, used, self.forget_batches)
        current = predict(model, used)
        loss = self.forget_term(current, original).mean()
        logs = {"forget_loss": loss.detach()}
        if "forget" in current:
            logs["forget_nll"] = current["forget"].mean(current["forget"].losses.detach()).mean()
        if "retain" in current:
            kept = self.retain_term(current["retain"], original.get("retain")).mean()
            loss = loss + self.retain_weight * kept
            logs["retain_loss"] = kept.detach()
        return loss, logs

    def check_head(self, model: nn.Module, head: str) -> None:
        """Raises ObjectiveError if the objective makes no sense with that head."""
        if head not in self.heads:
            raise ObjectiveError(
                f"{self.name} makes no sense for {type(model).__name__}, which has a {head} head; "
                f"it is for: {', '.join(self.heads)}. Choose an objective of likelihoods, such as npo or simnpo"
            )


def announce(trained: Trained, batches: Mapping[str, Batch], forget_batches: tuple[str, ...]) -> None:
    """Tells the training which records of the next pass are to be forgotten."""
    records = {name: len(batch["labels"]) for name, batch in batches.items()}
    tokens = max((batch["input_ids"].shape[1] for batch in batches.values() if "input_ids" in batch), default=1)
    trained.reach(sum(records[name] for name in forget_batches), sum(records.values()), tokens)


def ungrouped(batch: Batch) -> Batch:
    """Without the groups that its tokens are recorded in, if they are: the original model is not what is measured."""
    return {name: tensor for name, tensor in batch.items() if name not in ("token_group", "decoder_token_group")}


def _with_mask(batch: Batch) -> Batch:
    """With an attention mask, which keeps out what joining batches adds."""
    if "attention_mask" in batch or "input_ids" not in batch:
        return batch
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; a reference must not see dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
