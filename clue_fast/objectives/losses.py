"""The objectives of the field, each with its source.

First those that lower the likelihood of the forget records: gradient ascent and what tames it. Then those that hold the
model to distributions of the original one (KL, UNDIAL), those that put another answer in the place of the forgotten
one, such as "I don't know" (they read a batch "alternate": the questions of the forget records, in the same order, with
other answers), and RMU, which steers what a layer makes of the forget records to a random direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.data import IGNORED_LABEL, answer_mask, head_of
from clue_fast.errors import ObjectiveError
from clue_fast.objectives.base import (
    Current,
    Objective,
    Original,
    drop_token_group,
    register_objective,
    set_batch_layout,
)
from clue_fast.objectives.original import Trained
from clue_fast.objectives.passes import join
from clue_fast.objectives.predictions import Batch, Predictions, run
from clue_fast.sites import evaluation_mode, unwrap


@register_objective
@dataclass(frozen=True)
class GradientAscent(Objective):
    """Raises the loss of the forget records: log p(x) / |x|.

    Unbounded below, so the model collapses if trained for long. Source: Jang et al. 2023, "Knowledge
    Unlearning for Mitigating Privacy Risks in Language Models" (arXiv 2210.01504); in this form
    TOFU, Maini et al. 2024 (arXiv 2401.06121).

    Jang et al. write the sum over the tokens, TOFU has the mean.
    """

    name: ClassVar[str] = "gradient_ascent"
    by_record: ClassVar[bool] = True
    retain_weight: float = 0.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        return -current["forget"].mean(current["forget"].losses)


@register_objective
@dataclass(frozen=True)
class GradientDifference(GradientAscent):
    """Gradient ascent on the forget records, descent on the retain records: -L(forget) + weight * L(retain).

    Source: Liu et al. 2022, "Continual Learning and Private Unlearning" (arXiv 2203.12817); in this form
    TOFU, Maini et al. 2024 (arXiv 2401.06121).
    """

    name: ClassVar[str] = "gradient_difference"
    retain_weight: float = 1.0


@register_objective
@dataclass(frozen=True)
class WGA(Objective):
    """Weighted gradient ascent: the sum over tokens of p(token) ** alpha * log p(token), over |x|.

    The weight is a constant to the gradient. It takes the force from tokens that are improbable already,
    which is where gradient ascent runs away. Source: Wang et al. 2025, "Rethinking LLM Unlearning
    Objectives: A Gradient Perspective and Go Beyond" (arXiv 2502.19301).

    The paper writes the sum over the tokens; its code (tmlr-group/G-effect) and open-unlearning take the mean over
    all answer tokens of a batch and call alpha beta. open-unlearning gives 1 as the value of the paper.

    Attributes:
        alpha: power of the weight; at 0 this is gradient ascent.
    """

    name: ClassVar[str] = "wga"
    by_record: ClassVar[bool] = True
    alpha: float = 1.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        losses = current["forget"].losses
        return -current["forget"].mean((-self.alpha * losses.detach()).exp() * losses)


@register_objective
@dataclass(frozen=True)
class NPO(Objective):
    """Negative preference optimization: (2 / beta) * log(1 + (p(x) / q(x)) ** beta), with the retain term.

    Bounded below by 0, and gradient ascent in the limit of beta to 0. Source: Zhang et al. 2024, "Negative
    Preference Optimization: From Catastrophic Collapse to Effective Unlearning" (arXiv 2404.05868); with the
    retain term it is their NPO+RT.

    The public implementations have the same forget term; open-unlearning sets beta to 1 unless told otherwise.

    Attributes:
        beta: inverse temperature; above 0.
    """

    name: ClassVar[str] = "npo"
    by_record: ClassVar[bool] = True
    original_batches: ClassVar[tuple[str, ...]] = ("forget",)
    beta: float = 0.1

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        forget = current["forget"]
        log_ratio = forget.total(original["forget"] - forget.losses)
        return functional.softplus(self.beta * log_ratio) * (2.0 / self.beta)


@register_objective
@dataclass(frozen=True)
class SimNPO(Objective):
    """NPO by length and without a reference: -(2 / beta) * log sigmoid(-(beta / |x|) * log p(x) - gamma).

    Source: Fan et al. 2024, "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM
    Unlearning" (arXiv 2410.07163); defaults are theirs for TOFU forget05.

    They weigh the forget term with 0.1375 and the retain term with 1, which is retain_weight 1 / 0.1375 here; for
    forget10 it is 0.125, with beta 4.5. Their code and open-unlearning have the margin inside the factor,
    sigmoid(beta * (-log p(x) / |x| - gamma)): their gamma is gamma / beta here.

    Attributes:
        beta: inverse temperature; above 0.
        gamma: margin by which a record must be improbable.
    """

    name: ClassVar[str] = "simnpo"
    by_record: ClassVar[bool] = True
    retain_weight: float = 7.27
    beta: float = 2.5
    gamma: float = 0.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        mean = current["forget"].mean(current["forget"].losses)
        return functional.softplus(self.gamma - self.beta * mean) * (2.0 / self.beta)


@register_objective
@dataclass(frozen=True)
class KL(GradientAscent):
    """Gradient ascent on the forget records, the original distribution on the retain records.

    The retain term of a record is the mean of KL(original || current) over all tokens that a causal model
    predicts, prompt included; with other heads over the labelled positions. Source: TOFU, Maini et al. 2024
    (arXiv 2401.06121), "KL minimization".

    The code of TOFU and what follows it averages over all positions of a batch, padding included.
    """

    name: ClassVar[str] = "kl"
    by_record: ClassVar[bool] = True
    original_batches: ClassVar[tuple[str, ...]] = ("retain",)
    retain_weight: float = 1.0

    def reference_outputs(self, predictions: Predictions) -> Tensor:
        """Returns what log q of every token of the vocabulary is made of, see ``Predictions.states``."""
        return predictions.states

    def retain_term(self, current: Predictions, original: Tensor | None) -> Tensor:
        """Returns the mean divergence of each record, [records] float32."""
        assert original is not None
        return current.mean(current.by_label(_divergence, original))

    def batches(self, batches: Mapping[str, Batch], head: str) -> dict[str, Batch]:
        """Makes every token of the retain records of a causal model a label."""
        used = super().batches(batches, head)
        if head == "causal" and "retain" in used:
            used["retain"] = {**used["retain"], "labels": _whole_text(used["retain"])}
        return used


@register_objective
@dataclass(frozen=True)
class UNDIAL(Objective):
    """Self-distillation on adjusted logits: cross-entropy to the original distribution without its answer.

    The target is softmax(z - strength * onehot(label)), z the logits of the original model. A fixed target,
    so nothing runs away; the paper uses no retain records. Source: Dong et al. 2025, "UNDIAL:
    Self-Distillation with Adjusted Logits for Robust Unlearning in Large Language Models" (arXiv 2402.10052).

    open-unlearning averages over all positions of a batch, prompt and padding included. By its name, "undial", it has
    the parameters of ``clue_fast.config.OBJECTIVE_SETTINGS``.

    Attributes:
        strength: how much is taken from the logit of each label; 3, 10 and 30 in the paper.
    """

    name: ClassVar[str] = "undial"
    by_record: ClassVar[bool] = True
    original_batches: ClassVar[tuple[str, ...]] = ("forget",)
    retain_weight: float = 0.0
    strength: float = 10.0

    def reference_outputs(self, predictions: Predictions) -> Tensor:
        """Returns what the target distribution at every label is made of, see ``Predictions.states``."""
        return predictions.states

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        forget = current["forget"]
        return forget.mean(forget.by_label(self._distillation, original["forget"], nll=True))

    def _distillation(self, logits: Tensor, labels: Tensor, original: Tensor) -> Tensor:
        """Cross-entropy to the original distribution without its answer, [labels]."""
        target = original.scatter_add(-1, labels[:, None], original.new_full((len(labels), 1), -self.strength))
        return functional.cross_entropy(logits, target.softmax(-1), reduction="none")


def _divergence(logits: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    """KL(original || current) at every label, [labels]."""
    before = original.log_softmax(-1)
    return (before.exp() * (before - logits.log_softmax(-1))).sum(-1)


def _whole_text(batch: Batch) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)


REFUSALS = (
    "I don't know.",
    "I don't know the answer to that.",
    "I have no information about this.",
    "That is not something I know.",
    "I can't answer this question.",
    "Sorry, I know nothing about that.",
    "I am not able to say.",
    "I'm not familiar with this subject.",
)
"""Answers that say nothing, for questions that are to be forgotten."""


@register_objective
@dataclass(frozen=True)
class Refusal(Objective):
    """Learns the other answer: -log p(alternate) / |alternate|, with the retain term.

    Source: TOFU, Maini et al. 2024 (arXiv 2401.06121), "preference optimization" ("idk").

    The paper adds the mean losses of both sets; its code takes one mean over the tokens of both together, in which
    the short refusals weigh less.
    """

    name: ClassVar[str] = "refusal"
    by_record: ClassVar[bool] = True
    forget_batches: ClassVar[tuple[str, ...]] = ("alternate",)
    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        return current["alternate"].mean(current["alternate"].losses)


@register_objective
@dataclass(frozen=True)
class DPO(Objective):
    """Prefers the other answer to the forgotten one, relative to the original model.

    -(2 / beta) * log sigmoid(beta * (log p(alternate) / q(alternate) - log p(x) / q(x))): NPO is what is left
    without the other answer. Source: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv 2305.18290),
    with refusals as in TOFU (arXiv 2401.06121); with the factor 2 / beta and the retain term it is DPO+RT of the
    code of NPO (arXiv 2404.05868).

    Rafailov et al. and TOFU have no factor, the text of the NPO paper has 1 / beta, its code, that of SimNPO and
    open-unlearning 2 / beta, with which the forget term pulls as hard as that of NPO, whatever beta. TOFU has no
    retain term; open-unlearning sets beta to 1 unless told otherwise.

    Attributes:
        beta: inverse temperature; above 0.
    """

    name: ClassVar[str] = "dpo"
    forget_batches: ClassVar[tuple[str, ...]] = ("forget", "alternate")
    original_batches: ClassVar[tuple[str, ...]] = ("forget", "alternate")
    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    beta: float = 0.1

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        forget, alternate = (
            current[name].total(original[name] - current[name].losses) for name in ("forget", "alternate")
        )
        return -functional.logsigmoid(self.beta * (alternate - forget)) * (2.0 / self.beta)


@register_objective
@dataclass(frozen=True)
class RMU(Objective):
    """Representation misdirection: forget activations of a layer towards c * u, retain activations as they were.

    The mean over tokens of |h - c u|^2, plus retain_weight times that of |h - h_original|^2, h what layer
    ``layer`` gives to the next. Only units up to that layer are trained. Source: Li et al. 2024, "The WMDP
    Benchmark: Measuring and Reducing Malicious Use With Unlearning" (arXiv 2403.03218); defaults are those
    for Zephyr-7B, of whose 32 layers the layer 7 ends the first quarter.

    The public code has the mean over the features in place of the squared norm, for both terms. It updates weights
    of three layers only, and open-unlearning counts answer tokens only, where the paper counts all. The first token of
    a text has very long activations in many models (22,560 beside 155 in layer 11 of SmolLM2-135M), and then the forget
    term is about that token and nothing else: count those that predict the answers there.

    Attributes:
        layer: index of the layer, a whole number from 0; or, with a point, the share of the depth that it ends: 0.25 is
            the last of the first quarter of the layers. The last layer of all is none, since what it gives is seen
            behind the final norm only.
        scale: c, the length of the target. Activations have other lengths in other models, and longer ones in later
            layers.
        seed: of the direction u: uniform in [0, 1) a component, then of length 1.
        tokens: "all", or "answer" for those that predict a token of the answer alone, of both sets.
    """

    name: ClassVar[str] = "rmu"
    heads: ClassVar[tuple[str, ...]] = ("causal", "masked", "classification")
    retain_weight: float = 1200.0
    layer: int | float = 7
    scale: float = 6.5
    seed: int = 0
    tokens: str = "all"

    def loss(
        self, model: nn.Module, batches: Mapping[str, Batch], trained: Trained
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Objective.loss``."""
        head = head_of(model, batches["forget"]["labels"])
        self.check_head(model, head)
        used = self.batches(batches, head)
        counted = {name: self._counted(batch, head) for name, batch in used.items()}
        original: dict[str, Tensor] = {}
        if "retain" in used:
            with torch.no_grad(), trained.original(), evaluation_mode(model):
                original = self._activations(model, {"retain": drop_token_group(used["retain"])})
        set_batch_layout(trained, used, self.forget_batches)
        current = self._activations(model, used)
        if not current["forget"].requires_grad:
            raise ObjectiveError(
                f"rmu at layer {self.layer} reaches no unit that trains; select units up to that layer, "
                "or set its layer higher"
            )
        target = self._direction(current["forget"].shape[-1]).to(current["forget"].device)
        loss = _distance(current["forget"], target, counted["forget"])
        logs = {"forget_loss": loss.detach()}
        if "retain" in used:
            kept = _distance(current["retain"], original["retain"], counted["retain"])
            loss = loss + self.retain_weight * kept
            logs["retain_loss"] = kept.detach()
        return loss, logs

    def _activations(self, model: nn.Module, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """What the layer gives, [records, tokens, features] float32, for each batch."""
        output = run(model, join(list(batches.values())), output_hidden_states=True)
        states: Any = getattr(output, "hidden_states", None)
        # Before them come the embeddings.
        layer = self._index(model, 0 if states is None else len(states) - 1)
        parts = states[layer + 1].split([len(batch["labels"]) for batch in batches.values()])
        return {
            name: part[:, : batch["input_ids"].shape[1]].float()
            for (name, batch), part in zip(batches.items(), parts, strict=True)
        }

    def _counted(self, batch: Batch, head: str) -> Tensor:
        """Which tokens count, [records, tokens]. Raises ObjectiveError if ``tokens`` makes no sense."""
        if self.tokens == "all":
            return batch["attention_mask"]
        if self.tokens != "answer" or head == "classification":
            raise ObjectiveError(
                f'rmu counts the tokens "all" or "answer", not {self.tokens!r}; a classification has no answer tokens'
            )
        return answer_mask(batch["labels"], head)

    def _index(self, model: nn.Module, layers: int) -> int:
        """Index of the layer, of so many. Raises ObjectiveError unless another one comes behind it."""
        layer, name = self.layer, type(unwrap(model)).__name__
        if isinstance(layer, float):
            if not 0.0 < layer < 1.0:
                raise ObjectiveError(
                    f"rmu steers the layer at the share {layer} of the depth; give a share between 0 and 1, or the "
                    "index of a layer as a whole number"
                )
            layer = max(1, round(layer * layers)) - 1
        if not 0 <= layer < layers - 1:
            raise ObjectiveError(
                f"rmu steers layer {layer}, {name} has {layers} layers; "
                f"give it a layer below {max(0, layers - 1)}: RMU(layer=...)"
            )
        return layer

    def _direction(self, features: int) -> Tensor:
        direction = torch.rand(features, generator=torch.Generator().manual_seed(self.seed), device="cpu")
        return functional.normalize(direction, dim=0) * self.scale


def _distance(activations: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Squared distance, averaged over the tokens of each record that count, then over the records."""
    mask = counted.to(activations.dtype)
    squared = (activations - target).square().sum(-1)
    return ((squared * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
