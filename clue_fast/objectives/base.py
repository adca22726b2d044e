"""What all objectives share: one forward pass a step, a forget term, a retain term, the original model, and a registry.

First how a model is run over the batches of a step, and what it says wherever it predicts a label; then ``Objective``;
last the objectives that there are, by name: those of this package, and any that is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.config import OBJECTIVE, OBJECTIVE_SETTINGS
from clue_fast.data import IGNORED_LABEL, answer_mask, head_of, shift_labels
from clue_fast.data.collator import HEADS
from clue_fast.deprecated import rename_members
from clue_fast.errors import DataError, ObjectiveError, SettingError, UnknownNameError
from clue_fast.sites import evaluation_mode, unwrap

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


Current = Mapping[str, Predictions]
Original = Mapping[str, Tensor]


class Trained(Protocol):
    """What an objective needs to know of the training: ``Sparse`` is one."""

    def original(self) -> AbstractContextManager[Any]:
        """The model as it was before training, for as long as the context lasts."""

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
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
    original_batches: ClassVar[tuple[str, ...]] = ()
    """The batches on which the original model is asked as well."""
    heads: ClassVar[tuple[str, ...]] = HEADS
    """The heads with which the objective makes sense."""
    retain_weight: float = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        rename_members(cls, remember="reference_outputs", reference="original_batches")

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """Returns the forget term of each record, [records] float32.

        Args:
            current: predictions of the model as it is, by the name of the batch.
            original: the ``reference_outputs`` of the original model, for the ``original_batches``.
        """
        raise NotImplementedError

    def retain_term(self, current: Predictions, original: Tensor | None) -> Tensor:
        """Returns the retain term of each record, [records] float32: -log p(x) / |x|."""
        return current.mean(current.losses)

    def reference_outputs(self, predictions: Predictions) -> Tensor:
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
            model: see ``clue_fast.data.collator`` for its heads.
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
        if self.original_batches:
            with torch.no_grad(), trained.original(), evaluation_mode(model):
                asked = predict(
                    model, {name: drop_token_group(used[name]) for name in self.original_batches if name in used}
                )
                original = {name: self.reference_outputs(predictions) for name, predictions in asked.items()}
        set_batch_layout(trained, used, self.forget_batches)
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


def set_batch_layout(trained: Trained, batches: Mapping[str, Batch], forget_batches: tuple[str, ...]) -> None:
    """Tells the training which records of the next pass are to be forgotten."""
    records = {name: len(batch["labels"]) for name, batch in batches.items()}
    tokens = max((batch["input_ids"].shape[1] for batch in batches.values() if "input_ids" in batch), default=1)
    trained.set_batch_layout(sum(records[name] for name in forget_batches), sum(records.values()), tokens)


def drop_token_group(batch: Batch) -> Batch:
    """Without the groups that its tokens are recorded in, if they are: the original model is not what is measured."""
    return {name: tensor for name, tensor in batch.items() if name not in ("token_group", "decoder_token_group")}


def _with_mask(batch: Batch) -> Batch:
    """With an attention mask, which keeps out what joining batches adds."""
    if "attention_mask" in batch or "input_ids" not in batch:
        return batch
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


Registered = TypeVar("Registered", bound=Objective)

OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(objective: type[Registered]) -> type[Registered]:
    """Makes an objective known by its name: to ``UnlearnTrainer``, ``unlearn`` and the command.

    A decorator of a frozen dataclass, whose docstring says what it computes and where it was published::

        @register_objective
        @dataclass(frozen=True)
        class Margin(Objective):
            name: ClassVar[str] = "margin"
            least: float = 5.0

            def forget_term(self, current, original):
                forget = current["forget"]
                return forget.mean((self.least - forget.losses).clamp(min=0.0))

    Raises:
        SettingError: another objective has that name.
    """
    known = OBJECTIVES.get(objective.name)
    # The same class may be defined again, as in a notebook.
    if known is not None and (known.__module__, known.__qualname__) != (objective.__module__, objective.__qualname__):
        raise SettingError(
            f"there is an objective {objective.name!r} already, {known.__qualname__}; choose another name"
        )
    OBJECTIVES[objective.name] = objective
    return objective


def get_objective(objective: str | Objective, **overrides: Any) -> Objective:
    """Returns an objective by its name, or the given one, with some of its parameters replaced.

    Parameters are otherwise those of its class, which are those of the paper; that of the default objective, by its
    name too, has the parameters that were chosen for it, see ``clue_fast.config``.

    Raises:
        UnknownNameError: no objective has that name.
        TypeError: the objective has no such parameter.
    """
    if isinstance(objective, Objective):
        return replace(objective, **overrides)
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    chosen = OBJECTIVE_SETTINGS if objective == OBJECTIVE else {}
    return OBJECTIVES[objective](**{**chosen, **overrides})


def default_objective() -> Objective:
    """Returns the objective of every training that does not say another, see ``clue_fast.config``."""
    return get_objective(OBJECTIVE)
