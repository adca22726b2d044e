"""RMU: steers what a layer makes of the forget records to a random direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.errors import ObjectiveError
from clue_fast.labels import head_of
from clue_fast.sites import unwrap
from clue_fast.training.objectives.base import Objective, Trained, announce, evaluating, ungrouped
from clue_fast.training.objectives.predictions import Batch, join, run


@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection: forget activations of a layer towards c * u, retain activations as they were.

    The mean over tokens of |h - c u|^2, plus retain_weight times that of |h - h_original|^2, h what layer
    ``layer`` gives to the next. Only units up to that layer are trained. Source: Li et al. 2024, "The WMDP
    Benchmark: Measuring and Reducing Malicious Use With Unlearning" (arXiv 2403.03218); defaults are those
    for Zephyr-7B.

    The public code has the mean over the features in place of the squared norm, for both terms. It updates weights
    of three layers only, and open-unlearning counts answer tokens only, where the paper counts all.

    Attributes:
        layer: index of the layer.
        scale: c, the length of the target.
        seed: of the direction u: uniform in [0, 1) a component, then of length 1.
    """

    name: ClassVar[str] = "rmu"
    heads: ClassVar[tuple[str, ...]] = ("causal", "masked", "classification")
    retain_weight: float = 1200.0
    layer: int = 7
    scale: float = 6.5
    seed: int = 0

    def loss(
        self, model: nn.Module, batches: Mapping[str, Batch], trained: Trained
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Objective.loss``."""
        head = head_of(model, batches["forget"]["labels"])
        self.check_head(model, head)
        used = self.batches(batches, head)
        original: dict[str, Tensor] = {}
        if "retain" in used:
            with torch.no_grad(), trained.original(), evaluating(model):
                original = self._activations(model, {"retain": ungrouped(used["retain"])})
        announce(trained, used, self.forget_batches)
        current = self._activations(model, used)
        if not current["forget"].requires_grad:
            raise ObjectiveError(
                f"rmu at layer {self.layer} reaches no unit that trains; select units up to that layer, "
                "or set its layer higher"
            )
        target = self._direction(current["forget"].shape[-1]).to(current["forget"].device)
        loss = _distance(current["forget"], target, used["forget"])
        logs = {"forget_loss": loss.detach()}
        if "retain" in used:
            kept = _distance(current["retain"], original["retain"], used["retain"])
            loss = loss + self.retain_weight * kept
            logs["retain_loss"] = kept.detach()
        return loss, logs

    def _activations(self, model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """What the layer gives, [records, tokens, features] float32, for each batch."""
        output = run(model, join(list(batches.values())), output_hidden_states=True)
        states: Any = getattr(output, "hidden_states", None)
        # Before them come the embeddings; the last has gone through the final norm already.
        if states is None or not 0 <= self.layer < len(states) - 2:
            layers = 0 if states is None else len(states) - 1
            raise ObjectiveError(
                f"rmu steers layer {self.layer}, {type(unwrap(model)).__name__} has {layers} layers; "
                f"give it a layer below {max(0, layers - 1)}: RMU(layer=...)"
            )
        parts = states[self.layer + 1].split([len(batch["labels"]) for batch in batches.values()])
        return {
            name: part[:, : batch["input_ids"].shape[1]].float()
            for (name, batch), part in zip(batches.items(), parts, strict=True)
        }

    def _direction(self, features: int) -> Tensor:
        direction = torch.rand(features, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return functional.normalize(direction, dim=0) * self.scale


def _distance(activations: Tensor, target: Tensor, batch: Batch) -> Tensor:
    """Squared distance, averaged over the tokens of each record, then over the records."""
    mask = batch["attention_mask"].to(activations.dtype)
    squared = (activations - target).square().sum(-1)
    return ((squared * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
