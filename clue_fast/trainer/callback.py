"""Conflict scores while training goes on: taken along in its forward passes, logged, and selected by anew."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback

from clue_fast.criteria import score
from clue_fast.criteria.registry import get_criterion
from clue_fast.errors import PatchError, SettingError
from clue_fast.ops import CRITERIA_OPS
from clue_fast.recording import Patched
from clue_fast.selection import Scores, Selection, select
from clue_fast.statistics import Statistics

OTHER = "other"
"""The group of passes that no step takes: the original model as reference, evaluation."""


class ConflictCallback(TrainerCallback):
    """Logs the conflict scores of what a trainer trains on, and can select anew, since circuits move in fine-tuning.

    The trainer has the model patched for as long as it trains; its ordinary forward passes are recorded. With every
    loss, the scores since the last one are logged: ``conflict_selected`` and ``conflict_others``, their means over the
    units that train and over all others, and ``conflict_overlap``, the Jaccard index of the units that train and those
    that would be selected now::

        trainer = clue_fast.UnlearnTrainer(model, ...)
        trainer.add_callback(clue_fast.ConflictCallback(trainer, relocalize_every=100))
        trainer.train()

    Args:
        trainer: an ``UnlearnTrainer``; or any other whose batches bring ``token_group``, see ``Patched.record``, after
            ``clue_fast.attach``.
        criterion: one that needs activations, or gradients, which are then those of the loss that trains.
        relocalize_every: optimizer steps after which the top of the ranking since the last selection is selected
            anew, and the moments of the optimizer start anew; default never. What was trained stays as it is.
        fraction: share of the units of each layer to select; default as large a share of all as is selected.

    Attributes:
        scores: the last that were logged or selected by.
        selections: those that were trained, the first one first.

    Raises:
        UnknownNameError: no such criterion.
        SettingError: the criterion needs more than training shows, relocalize_every is below 1, the trainer trains
            in stages, or it does not train selected units.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        criterion: str = "difference",
        relocalize_every: int | None = None,
        fraction: float | None = None,
    ) -> None:
        chosen = get_criterion(criterion)
        if not chosen.measurement.live:
            raise SettingError(
                f"criterion {criterion!r} needs {chosen.needs.replace('_', ' ')}, which training does not show; "
                "choose difference, ratio or attribution"
            )
        self.trainer = trainer
        if getattr(trainer, "sparse_training", None) is None:
            raise SettingError("the trainer does not train selected units; use UnlearnTrainer, or attach a selection")
        if relocalize_every is not None and relocalize_every < 1:
            raise SettingError(f"relocalize_every {relocalize_every} is not a number of steps; 1 is the least")
        if relocalize_every is not None and getattr(trainer, "stages", None) is not None:
            raise SettingError("stages train units of the categories that they begin with; leave out one of both")
        self.criterion, self.gradients = criterion, chosen.measurement.gradients
        self.relocalize_every, self.fraction = relocalize_every, fraction
        self.scores: Scores | None = None
        self.selections: list[Selection] = [self.trainer.sparse.selection]
        self._block = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Patches the model and records from now on."""
        self._end()  # of a training that broke off
        self.trainer.groups_tokens = True
        self.trainer.sparse_training.further_logs.append(self._figures)
        self._begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Selects anew when it is time."""
        if self.relocalize_every and state.global_step and state.global_step % self.relocalize_every == 0:
            self._stop()
            selection = self._select(self._since_selection)
            self.trainer.sparse_training.reselect(selection)
            self.selections.append(selection)
            self._begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the model as it was before training, but for what was trained."""
        self._end()

    def _begin(self) -> None:
        patched = self.trainer.sparse_training.patched
        if patched is None:
            raise PatchError("the model was patched before the training; unpatch it, the trainer patches it by itself")
        if patched.sites != self.trainer.sparse.selection.sites:
            raise PatchError("channels of MLPs and experts are scored while they train, the selection has other units")
        self._patched: Patched = patched
        self._since_selection = patched.statistics.empty()
        self._record()

    def _record(self) -> None:
        # A step whose activations are not finite trains nothing, and is not to spoil the scores either.
        score = self.criterion if self.criterion in CRITERIA_OPS else None
        block = self._patched.record(OTHER, gradients=self.gradients, score=score, on_nonfinite="skip_batch")
        self._block.enter_context(block)

    def _end(self) -> None:
        self._block.close()
        self.trainer.groups_tokens = False
        if self._figures in self.trainer.sparse_training.further_logs:
            self.trainer.sparse_training.further_logs.remove(self._figures)

    def _stop(self) -> Statistics:
        """Ends the recording; returns what was recorded since the last time."""
        self._block.close()
        self._since_selection.add(self._patched.statistics)
        return self._patched.statistics

    def _select(self, statistics: Statistics) -> Selection:
        self.scores = score(statistics, self.criterion)
        return select(self.scores, fraction=self.fraction or self.trainer.sparse.selection.fraction)

    def _figures(self) -> dict[str, float]:
        recorded = self._stop()
        training, now = self.trainer.sparse.selection, self._select(recorded)
        recorded.reset()
        self._record()
        selected = torch.cat([now.scores[site][training.units(site)] for site in now.sites])
        everything = torch.cat([now.scores[site] for site in now.sites])
        others = (everything.sum() - selected.sum()) / max(1, len(everything) - len(selected))
        return {
            "conflict_selected": float(selected.mean()),
            "conflict_others": float(others),
            "conflict_overlap": training.overlap(now),
        }
