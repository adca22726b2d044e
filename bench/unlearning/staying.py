"""What is to make forgetting stay: units that begin anew, and a forget gradient taken where relearning may lead.

Relearning is a few steps of training on some of the forgotten facts. Two of the methods here take the gradient of the
forget term not at the weights as they are but elsewhere (``ForgettingElsewhere``): where the term is worst in a small
neighbourhood, or where a few steps of relearning end. That of the retain term is taken where the weights are, as in
both papers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.unlearning.grid import Method
from clue_fast.objectives import GradientAscent, Objective
from clue_fast.sparse import Sparse
from clue_fast.trainer import UnlearnTrainer

Batches = Mapping[str, Mapping[str, Tensor]]


def trainer_of(method: Method) -> Callable[..., UnlearnTrainer]:
    """Makes the trainer of a method, from the arguments of ``UnlearnTrainer``."""

    def make(**settings: Any) -> UnlearnTrainer:
        trainer: UnlearnTrainer
        if method.sharpness:
            trainer = SharpnessAware(method.sharpness, **settings)
        elif method.relearn_inside:
            trainer = RelearnedInside(method.relearn_inside, method.relearn_inside_rate, **settings)
        else:
            trainer = UnlearnTrainer(**settings)
        if method.reset is not None:
            reset(trainer.sparse, method.reset)
        return trainer

    return make


@torch.no_grad()
def reset(sparse: Sparse, what: str) -> None:
    """Sets what the selected units read or write to the mean over all units of their site, them included.

    The original model, as objectives see it, stays what it was.

    Args:
        sparse: before its first step.
        what: "reads" for the rows of gate and up, "writes" for the columns of down.
    """
    for site in sparse.selection.sites:
        units = sparse.selection.units(site)
        for owned in site.slices:
            if owned.parameter.startswith(site.output) != (what == "writes"):
                continue
            weight = owned.of(sparse.model.get_parameter(owned.parameter))
            every = weight.index_select(owned.dim, owned.index(torch.arange(site.width))).float()
            mean = every.unflatten(owned.dim, (site.width, owned.size)).mean(owned.dim)
            weight.index_copy_(owned.dim, owned.index(units), torch.cat([mean] * len(units), owned.dim).to(weight))
    for trained in sparse.slices:
        trained.refresh(trained.read())


class ForgettingElsewhere(UnlearnTrainer):
    """Trains on ∇retain(w) + ∇forget(w + offsets), w the weights of the selected units.

    The offsets are taken as they are: nothing is differentiated through them.
    """

    def offsets(self, forget: Sequence[Tensor], inputs: Batches) -> list[Tensor]:
        """How far from the weights the forget term is to be differentiated, for each of the slices.

        Args:
            forget: the gradient of the forget term at the weights, for each of the slices.
            inputs: the batches of the step.
        """
        raise NotImplementedError

    def gradient(self, objective: Objective, inputs: Batches) -> list[Tensor]:
        """The gradient of the forget term of an objective, for each of the slices; 0 where it does not reach."""
        loss, _ = replace(objective, retain_weight=0.0).loss(self.sparse.model, inputs, self.sparse)
        values = self.sparse.trainable_parameters
        found = torch.autograd.grad(loss, values, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for v, g in zip(values, found, strict=True)]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the objective, with another gradient.

        The gradient is that of both terms at the weights, which comes from one pass, minus that of the forget term
        there, plus that of the forget term elsewhere.
        """
        here = self.gradient(self.objective, inputs)
        with self.sparse.moved(self.offsets(here, inputs)):
            there = self.gradient(self.objective, inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        for values, one, other in zip(self.sparse.trainable_parameters, here, there, strict=True):
            loss = loss + ((values - values.detach()) * (other - one)).sum()  # 0, and its gradient is the difference
        return loss


class SharpnessAware(ForgettingElsewhere):
    """The forget term where it is highest within a radius, to first order.

    Source: Fan et al. 2025, "Towards LLM Unlearning Resilient to Relearning Attacks: A Sharpness-Aware Minimization
    Perspective and Beyond" (arXiv 2502.05374), after Foret et al. 2021 (arXiv 2010.01412). There all weights move;
    here those that train.

    Args:
        radius: rho, the length of all offsets together.
        settings: of ``UnlearnTrainer``.
    """

    def __init__(self, radius: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.radius = radius

    def offsets(self, forget: Sequence[Tensor], inputs: Batches) -> list[Tensor]:
        """See ``ForgettingElsewhere``."""
        length = torch.stack([gradient.square().sum() for gradient in forget]).sum().sqrt()
        scale = self.radius / length.clamp_min(torch.finfo(length.dtype).tiny)
        return [gradient * scale for gradient in forget]


class RelearnedInside(ForgettingElsewhere):
    """The forget term where some steps of gradient descent on the forgotten answers end.

    Source: Tamirisa et al. 2024, "Tamper-Resistant Safeguards for Open-Weight LLMs" (arXiv 2408.00761), with the
    gradient of the first order. There an attack draws data and settings and trains all weights with an optimizer, and
    the gradients after each of its steps are averaged; here it learns the records of the step, trains the weights of
    the selected units, and the gradient after its last step counts.

    Args:
        steps: of the descent.
        rate: its learning rate.
        settings: of ``UnlearnTrainer``.
    """

    def __init__(self, steps: int, rate: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.steps, self.rate = steps, rate

    def offsets(self, forget: Sequence[Tensor], inputs: Batches) -> list[Tensor]:
        """See ``ForgettingElsewhere``."""
        offsets = [torch.zeros_like(gradient) for gradient in forget]
        for _ in range(self.steps):
            with self.sparse.moved(offsets):
                unlearning = self.gradient(GradientAscent(), inputs)
            offsets = [offset + self.rate * gradient for offset, gradient in zip(offsets, unlearning, strict=True)]
        return offsets
