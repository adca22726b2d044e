"""What all objectives share: a forget term, a retain term, the original model, and a registry.

First ``Objective``; then the objectives that there are, by name: those of this package, and any that is registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from clue_fast.config import OBJECTIVE, OBJECTIVE_SETTINGS
from clue_fast.data import answer_mask, head_of
from clue_fast.data.collator import HEADS
from clue_fast.deprecated import rename_members
from clue_fast.errors import ObjectiveError, SettingError, UnknownNameError
from clue_fast.objectives.backward import can_run_backward, run_backward
from clue_fast.objectives.original import Trained, original_outputs
from clue_fast.objectives.passes import passes_of, run_passes
from clue_fast.objectives.predictions import Batch, Predictions

Current = Mapping[str, Predictions]
Original = Mapping[str, Tensor]


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
    by_record: ClassVar[bool] = False
    """Whether each term depends on what its own record is predicted alone: then passes over some records each can be
    run backward one after another. A class that writes a term of its own says so itself."""
    retain_weight: float = 1.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        rename_members(cls, remember="reference_outputs", reference="original_batches")
        if "by_record" not in vars(cls) and not vars(cls).keys().isdisjoint(("forget_term", "retain_term")):
            cls.by_record = False

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
        """Returns what is needed later of the original model's predictions, [labels, ...]; -log p of every label.

        It is kept for the next time that a record comes, see ``clue_fast.objectives.original``.
        """
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

        Where the terms are of each record alone and the training has ``backward_by_pass``, the loss of several passes
        is one of which each pass has been run backward already, so that the activations of one are alive at a time.

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
        asked = {name: drop_token_group(used[name]) for name in self.original_batches if name in used}
        original = original_outputs(model, asked, trained, self.reference_outputs, repr(self)) if asked else {}
        lower_layers = getattr(trained, "lower_layers", None)
        around = None if lower_layers is None else lower_layers.of_step(model)
        passes = passes_of(model, used, getattr(trained, "packed_tokens", None))
        apart = self.by_record and len(self.forget_batches) == 1 and len(passes) > 1
        apart = apart and getattr(trained, "backward_by_pass", False)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad] if apart else []
        if not can_run_backward(parameters):
            found = run_passes(model, passes, trained.set_batch_layout, around)
            return self._terms(found, original, dict.fromkeys(used, 1.0))

        def parts() -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
            counted = {name: answer_mask(used[name]["labels"], head) for name in used}
            for one in passes:
                known = {name: one.of_labels(name, values, counted[name]) for name, values in original.items()}
                shares = {name: len(records) / len(counted[name]) for name, records in one.records.items()}
                yield self._terms(one.run(model, trained.set_batch_layout, around), known, shares)

        return run_backward(parts(), parameters)

    def _terms(
        self, current: Current, original: Original, shares: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What records add to the loss, and to what is logged; shares are those of all of their set that they are."""
        parts: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        if share := shares[self.forget_batches[0]]:
            parts.append(share * self.forget_term(current, original).mean())
            logs["forget_loss"] = parts[0].detach()
        if share := shares.get("forget", 0.0):
            logs["forget_nll"] = share * current["forget"].mean(current["forget"].nll).mean()
        if share := shares.get("retain", 0.0):
            kept = share * self.retain_term(current["retain"], original.get("retain")).mean()
            parts.append(self.retain_weight * kept)
            logs["retain_loss"] = kept.detach()
        return sum(parts[1:], parts[0]), logs

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
            by_record: ClassVar[bool] = True
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
