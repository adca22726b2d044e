"""Objectives that lower the likelihood of the forget records: gradient ascent and what tames it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from clue_fast.training.objectives.base import Current, Objective, Original


@dataclass(frozen=True)
class GradientAscent(Objective):
    """Raises the loss of the forget records: log p(x) / |x|.

    Unbounded below, so the model collapses if trained for long. Source: Jang et al. 2023, "Knowledge
    Unlearning for Mitigating Privacy Risks in Language Models" (arXiv 2210.01504); in this form
    TOFU, Maini et al. 2024 (arXiv 2401.06121).

    Jang et al. write the sum over the tokens, TOFU has the mean.
    """

    name: ClassVar[str] = "gradient_ascent"
    retain_weight: float = 0.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        return -current["forget"].mean(current["forget"].losses)


@dataclass(frozen=True)
class GradientDifference(GradientAscent):
    """Gradient ascent on the forget records, descent on the retain records: -L(forget) + weight * L(retain).

    Source: Liu et al. 2022, "Continual Learning and Private Unlearning" (arXiv 2203.12817); in this form
    TOFU, Maini et al. 2024 (arXiv 2401.06121).
    """

    name: ClassVar[str] = "gradient_difference"
    retain_weight: float = 1.0


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
    alpha: float = 1.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        losses = current["forget"].losses
        return -current["forget"].mean((-self.alpha * losses.detach()).exp() * losses)


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
    reference: ClassVar[tuple[str, ...]] = ("forget",)
    beta: float = 0.1

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        forget = current["forget"]
        log_ratio = forget.total(original["forget"] - forget.losses)
        return functional.softplus(self.beta * log_ratio) * (2.0 / self.beta)


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
    retain_weight: float = 7.27
    beta: float = 2.5
    gamma: float = 0.0

    def forget_term(self, current: Current, original: Original) -> Tensor:
        """See ``Objective.forget_term``."""
        mean = current["forget"].mean(current["forget"].losses)
        return functional.softplus(self.gamma - self.beta * mean) * (2.0 / self.beta)
