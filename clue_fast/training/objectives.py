"""Objectives: the loss of a batch of what must be forgotten, beside a batch of what must be kept.

Notation: x a record, |x| its number of answer tokens, log p(x) the sum of their log-probabilities under the
model, log q(x) the same under the original model. The loss of a record is that of TOFU (arXiv 2401.06121):
the mean over its answer tokens, -log p(x) / |x|; a batch is the mean over its records. So a step does not
depend on padding, nor on how a batch is cut for gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.errors import UnknownNameError

Batch = Mapping[str, Tensor]
ReferenceContext = Callable[[], AbstractContextManager[Any]]
IGNORED = -100


class RecordLoss(NamedTuple):
    """Negative log-likelihood of every record of a batch.

    Attributes:
        total: summed over the answer tokens, -log p(x), [records] float32.
        tokens: number of answer tokens |x|, [records] int64.
    """

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """-log p(x) / |x|, [records] float32; 0 for a record without answer tokens."""
        return self.total / self.tokens.clamp(min=1)


def record_loss(model: nn.Module, batch: Batch) -> RecordLoss:
    """Runs a causal language model and returns the loss of every record.

    Args:
        model: gives ``.logits`` [records, tokens, vocabulary].
        batch: ``input_ids``, ``attention_mask`` and ``labels`` [records, tokens]; label -100 is not counted.
            The label of a token is predicted from the tokens before it.
    """
    # Caching keys is of no use here, and not compatible with gradient checkpointing.
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    labels = batch["labels"][:, 1:]
    counted = labels != IGNORED
    losses = functional.cross_entropy(output.logits[:, :-1][counted].float(), labels[counted], reduction="none")
    total = torch.zeros(labels.shape, device=losses.device).masked_scatter(counted, losses).sum(-1)
    return RecordLoss(total, counted.sum(-1))


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: loss = forget term + retain_weight * mean loss of the retain records.

    Attributes:
        retain_weight: weight of the retain term; at 0 the retain records are not run at all.
    """

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = False
    retain_weight: float = 1.0

    def forget_term(self, current: RecordLoss, reference: RecordLoss | None) -> Tensor:
        """Returns the forget term of each record, [records] float32.

        Args:
            current: of the model as it is.
            reference: of the original model, only if ``needs_reference``.
        """
        raise NotImplementedError

    def loss(
        self, model: nn.Module, forget: Batch, retain: Batch | None, reference: ReferenceContext
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss to run backward, and detached scalars to log.

        Args:
            model: a causal language model.
            forget: batch, see ``record_loss``.
            retain: batch; may be None if ``retain_weight`` is 0.
            reference: makes a context in which the model is its original self, such as ``Sparse.original``.
        """
        # The reference goes first: swapping weights later would break the graph of the pass that trains.
        original = self._reference_loss(model, forget, reference) if self.needs_reference else None
        current = record_loss(model, forget)
        loss = self.forget_term(current, original).mean()
        logs = {"forget_loss": loss.detach(), "forget_nll": current.mean.detach().mean()}
        if self.retain_weight:
            if retain is None:
                raise ValueError(f"{self.name} has a retain_weight of {self.retain_weight} but got no retain batch")
            kept = record_loss(model, retain).mean.mean()
            loss = loss + self.retain_weight * kept
            logs["retain_loss"] = kept.detach()
        return loss, logs

    def _reference_loss(self, model: nn.Module, batch: Batch, reference: ReferenceContext) -> RecordLoss:
        with torch.no_grad(), reference(), _evaluating(model):
            return record_loss(model, batch)


@dataclass(frozen=True)
class GradientAscent(Objective):
    """Raises the loss of the forget records: log p(x) / |x|.

    Unbounded below, so the model collapses if trained for long. Source: Jang et al. 2023, "Knowledge
    Unlearning for Mitigating Privacy Risks in Language Models" (arXiv 2210.01504).
    """

    name: ClassVar[str] = "gradient_ascent"
    retain_weight: float = 0.0

    def forget_term(self, current: RecordLoss, reference: RecordLoss | None) -> Tensor:
        """See ``Objective.forget_term``."""
        return -current.mean


@dataclass(frozen=True)
class GradientDifference(Objective):
    """Gradient ascent on the forget records, descent on the retain records: -L(forget) + weight * L(retain).

    Source: Liu et al. 2022, "Continual Learning and Private Unlearning" (arXiv 2203.12817); in this form
    TOFU, Maini et al. 2024 (arXiv 2401.06121).
    """

    name: ClassVar[str] = "gradient_difference"

    def forget_term(self, current: RecordLoss, reference: RecordLoss | None) -> Tensor:
        """See ``Objective.forget_term``."""
        return -current.mean


@dataclass(frozen=True)
class NPO(Objective):
    """Negative preference optimization: (2 / beta) * log(1 + (p(x) / q(x)) ** beta), with the retain term.

    Bounded below by 0, and gradient ascent in the limit of beta to 0. Source: Zhang et al. 2024, "Negative
    Preference
    Optimization: From Catastrophic Collapse to Effective Unlearning" (arXiv 2404.05868); with the retain
    term it is their NPO+RT.

    Attributes:
        beta: inverse temperature; above 0.
    """

    name: ClassVar[str] = "npo"
    needs_reference: ClassVar[bool] = True
    beta: float = 0.1

    def forget_term(self, current: RecordLoss, reference: RecordLoss | None) -> Tensor:
        """See ``Objective.forget_term``."""
        assert reference is not None
        log_ratio = reference.total - current.total
        return functional.softplus(self.beta * log_ratio) * (2.0 / self.beta)


@dataclass(frozen=True)
class SimNPO(Objective):
    """NPO by length and without a reference: -(2 / beta) * log sigmoid(-(beta / |x|) * log p(x) - gamma).

    Source: Fan et al. 2024, "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM
    Unlearning" (arXiv 2410.07163).

    Attributes:
        beta: inverse temperature; above 0.
        gamma: margin by which a record must be improbable.
    """

    name: ClassVar[str] = "simnpo"
    beta: float = 2.5
    gamma: float = 0.0

    def forget_term(self, current: RecordLoss, reference: RecordLoss | None) -> Tensor:
        """See ``Objective.forget_term``."""
        return functional.softplus(self.gamma - self.beta * current.mean) * (2.0 / self.beta)


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (GradientAscent, GradientDifference, NPO, SimNPO)
}


def get_objective(objective: str | Objective, **overrides: float) -> Objective:
    """Returns an objective by its name, or the given one, with some of its parameters replaced.

    Raises:
        UnknownNameError: no objective has that name.
        TypeError: the objective has no such parameter.
    """
    if isinstance(objective, Objective):
        return replace(objective, **overrides)
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    return OBJECTIVES[objective](**overrides)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; a reference must not see dropout."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
