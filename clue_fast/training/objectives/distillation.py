"""Objectives that hold the model to distributions of the original one: KL and UNDIAL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clue_fast.labels import IGNORED_LABEL
from clue_fast.training.objectives.base import Current, Objective, Original
from clue_fast.training.objectives.likelihood import GradientAscent
from clue_fast.training.objectives.predictions import Batch, Predictions


@dataclass(frozen=True)
class KL(GradientAscent):
    """Gradient ascent on the forget records, the original distribution on the retain records.

    The retain term of a record is the mean of KL(original || current) over all tokens that a causal model
    predicts, prompt included; with other heads over the labelled positions. Source: TOFU, Maini et al. 2024
    (arXiv 2401.06121), "KL minimization".

    The code of TOFU and what follows it averages over all positions of a batch, padding included.
    """

    name: ClassVar[str] = "kl"
    reference: ClassVar[tuple[str, ...]] = ("retain",)
    retain_weight: float = 1.0

    def remember(self, predictions: Predictions) -> Tensor:
        """Returns log q of every token of the vocabulary, [labels, vocabulary]."""
        return predictions.logits.log_softmax(-1)

    def retain_term(self, current: Predictions, original: Tensor | None) -> Tensor:
        """Returns the mean divergence of each record, [records] float32."""
        assert original is not None
        divergence = (original.exp() * (original - current.logits.log_softmax(-1))).sum(-1)
        return current.mean(divergence)

    def batches(self, batches: Mapping[str, Batch], head: str) -> dict[str, Batch]:
        """Makes every token of the retain records of a causal model a label."""
        used = super().batches(batches, head)
        if head == "causal" and "retain" in used:
            used["retain"] = {**used["retain"], "labels": _whole_text(used["retain"])}
        return used


@dataclass(frozen=True)
class UNDIAL(Objective):
    """Self-distillation on adjusted logits: cross-entropy to the original distribution without its answer.

    The target is softmax(z - strength * onehot(label)), z the logits of the original model. A fixed target,
    so nothing runs away; the paper uses no retain records. Source: Dong et al. 2025, "UNDIAL:
    Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models" (arXiv 2402.10052).

    open-unlearning averages over all positions of a batch, prompt and padding included.

    Attributes:
        strength: how much is taken from the logit of each label; 3, 10 and 30 in the paper.
    """

    name: ClassVar[str] = "undial"
    reference: ClassVar[tuple[str, ...]] = ("forget",)
    retain_weight: float = 0.0
    strength: float = 10.0

    def remember(self, predictions: Predictions) -> Tensor:
        """Returns the target distribution at every label, [labels, vocabulary]."""
        adjusted = predictions.logits.clone()
        adjusted[torch.arange(len(adjusted), device=adjusted.device), predictions.labels] -= self.strength
        return adjusted.softmax(-1)

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        forget = current["forget"]
        return forget.mean(-(original["forget"] * forget.logits.log_softmax(-1)).sum(-1))


def _whole_text(batch: Batch) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)
