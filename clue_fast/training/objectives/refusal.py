"""Objectives that put another answer in the place of the forgotten one, such as "I don't know".

They read a batch "alternate": the questions of the forget records, in the same order, with other answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from clue_fast.training.objectives.base import Current, Objective, Original

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


@dataclass(frozen=True)
class Refusal(Objective):
    """Learns the other answer: -log p(alternate) / |alternate|, with the retain term.

    Source: TOFU, Maini et al. 2024 (arXiv 2401.06121), "preference optimization" ("idk").

    The paper adds the mean losses of both sets; its code takes one mean over the tokens of both together, in which
    the short refusals weigh less.
    """

    name: ClassVar[str] = "refusal"
    forget_batches: ClassVar[tuple[str, ...]] = ("alternate",)
    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        return current["alternate"].mean(current["alternate"].losses)


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
    reference: ClassVar[tuple[str, ...]] = ("forget", "alternate")
    heads: ClassVar[tuple[str, ...]] = ("causal", "seq2seq")
    beta: float = 0.1

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        forget, alternate = (
            current[name].total(original[name] - current[name].losses) for name in ("forget", "alternate")
        )
        return -functional.logsigmoid(self.beta * (alternate - forget)) * (2.0 / self.beta)
