"""The criteria of the field, one function each.

E is the mean over the counted tokens of a set, those that predict an answer token, E_s that over its records s, a the
activation of a unit, and p = a·∂f/∂a its first-order effect on the target f. A unit u owns the weights w_u: its rows
and columns of the modules around it; g_u(s) is the gradient of the loss of record s, the mean over its answer tokens,
with respect to them, and ḡ_u = E_s g_u(s). Formulas that the field has for single weights are summed over the weights
of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clue_fast.criteria.integrated_gradients import INTEGRATED
from clue_fast.criteria.registry import Measured, Units, criterion
from clue_fast.criteria.weight_gradients import MAGNITUDE, OVERLAP, PRODUCT, SQUARE, WEIGHTED_INPUT

FISHER_FLOOR = 1e-12
WAGLE_GAMMA = 1e-6


def _closed_form(measured: Measured, name: str) -> Tensor:
    """Those that recording wrote on its way, or one launch over all units of the model."""
    return measured.statistics.scores(name, measured.backend)


@criterion(needs="activations", reads=("mean", "variance"))
def difference(measured: Measured) -> Tensor:
    """|E_forget[a] - E_retain[a]| / sqrt((Var_forget[a] + Var_retain[a]) / 2)

    Large for units that act differently on the two sets, whichever is higher; small where both are high.

    Source: standardized mean difference, Cohen 1988; the conflict of units, after CLUE, arXiv 2509.20977.
    """
    return _closed_form(measured, "difference")


@criterion(needs="activations", reads=("mean", "variance"))
def signed_difference(measured: Measured) -> Tensor:
    """(E_forget[a] - E_retain[a]) / sqrt((Var_forget[a] + Var_retain[a]) / 2)

    Large for units that are higher on forget data only.

    Source: standardized mean difference, Cohen 1988.
    """
    return _closed_form(measured, "signed_difference")


@criterion(needs="activations", reads=("mean", "variance"))
def welch(measured: Measured) -> Tensor:
    """|E_forget[a] - E_retain[a]| / sqrt(Var_forget[a] / n_forget + Var_retain[a] / n_retain)

    n are the numbers of counted tokens: the difference in units of its standard error, with unbiased variances.

    Source: Welch 1947, The generalization of Student's problem, Biometrika 34.
    """
    return _closed_form(measured, "welch")


@criterion(needs="activations", importance=lambda units: units.abs_mean, reads=("abs_mean",))
def ratio(measured: Measured) -> Tensor:
    """E_forget|a| / (E_retain|a| + 0.01)

    The importance of the paper that it calls absolute, over all tokens of a text; here over the counted ones.

    Source: Pochinkov & Schoots 2024, arXiv 2403.01267.
    """
    return _closed_form(measured, "ratio")


@criterion(
    needs="gradients",
    target="log_odds",
    importance=lambda units: units.abs_attribution,
    reads=("abs_attribution",),
)
def attribution(measured: Measured) -> Tensor:
    """E_forget|p| - E_retain|p|

    f is the log-odds of the answer tokens unless another target is asked for: where an answer is memorized, the
    gradient of its loss is nearly noise. The paper has the loss, and takes the mean over the positions of an example
    before the magnitude; here every token counts by itself, so that effects of both signs do not cancel.

    Source: first-order Taylor importance, Molchanov et al. 2017, arXiv 1611.06440.
    """
    return _closed_form(measured, "attribution")


@criterion(
    needs="gradients",
    target="log_odds",
    importance=lambda units: units.abs_attribution,
    reads=("abs_attribution",),
)
def forget_attribution(measured: Measured) -> Tensor:
    """E_forget|p|

    What matters to the forget set, whether or not it matters to the retain set as well. Where a few units were made to
    hold a passage, this found them (``examples/planted_truth.py``): they had come to matter to everything, so that the
    difference of ``attribution`` did not.

    Source: first-order Taylor importance, Molchanov et al. 2017, arXiv 1611.06440.
    """
    return _closed_form(measured, "forget_attribution")


def _fisher(units: Units) -> Tensor:
    return units.record_mean(SQUARE)


@criterion(needs="squared_gradients", target="loss", importance=_fisher)
def fisher(measured: Measured) -> Tensor:
    """F_forget / F_retain with F = E_s |g_u(s)|²

    F is the diagonal of the empirical Fisher information summed over the weights of the unit. The paper dampens each
    weight where F_forget > alpha F, F over the whole training data, which rises with the ratio; its ratio is of
    single weights, here of the sums over a unit. Its public code squares gradients of batches, here of records.

    Source: selective synaptic dampening (SSD), Foster et al. 2024, arXiv 2308.07707.
    """
    return _fisher(measured.forget) / (_fisher(measured.retain) + FISHER_FLOOR)


def _wanda(units: Units) -> Tensor:
    return units.record_mean(WEIGHTED_INPUT)


@criterion(needs="weight_inputs", importance=_wanda)
def wanda(measured: Measured) -> Tensor:
    """S_forget - S_retain with S = sum over the weights w_ij of the unit of |w_ij| sqrt(E[z_j²])

    z_j is the input that the weight multiplies; the paper has its norm over the tokens, here divided by their
    number, so that sets of different sizes compare. Of two sets, Wei et al. take the top weights of one without
    those of the other; that are the categories, while this is the difference of both scores.

    Source: Sun et al. 2024, arXiv 2306.11695, equation 1; of two sets, Wei et al. 2024, arXiv 2402.05162.
    """
    return _wanda(measured.forget) - _wanda(measured.retain)


def _saliency(units: Units) -> Tensor:
    return units.record_mean(MAGNITUDE)


@criterion(needs="mean_gradients", target="loss", importance=_saliency)
def salun(measured: Measured) -> Tensor:
    """Sum over the weights i of the unit of |ḡ_forget,i|

    The paper thresholds the magnitude of the gradient of the forgetting loss, over the whole forget set, for each
    weight. Its public code also takes a step of SGD after each batch that it adds; here the weights stay.

    Source: saliency unlearning, Fan et al. 2024, arXiv 2310.12508, weight saliency mask.
    """
    return _saliency(measured.forget)


@criterion(needs="mean_gradients", target="loss", importance=lambda units: units.record_mean(PRODUCT).abs())
def wagle(measured: Measured) -> Tensor:
    """|sum over the weights i of the unit of (w_i - ḡ_retain,i / γ) ḡ_forget,i| with γ = 1e-6

    S_i = w_i ḡ_forget,i - ḡ_retain,i ḡ_forget,i / γ is how much the forget loss changes to first order with a factor
    on weight i, when the retain loss is minimized again with a Hessian of γ on its diagonal. So that of one factor on
    all weights of the unit is their sum; a sum of |S_i| would lose nearly all that the retain set has to say, see
    ``docs/localization.md``. The public code (OPTML-Group/WAGLE) takes the weights with the greatest |S_i|, with
    γ = 1e-6 ("mu") in its configurations of TOFU and WMDP. It has sums over the records where the paper has means,
    which makes γ smaller still. At this γ the second term decides nearly alone: a unit scores high where the gradients
    of both sets overlap, with either sign.

    The categories come from the first term of each set, |sum w_i ḡ_i|. Where statistics are merged, the overlap is
    that inside each recording.

    Source: Jia et al. 2024, arXiv 2410.17509, weight attribution score.
    """
    forget, retain = measured.forget, measured.retain
    return (forget.record_mean(PRODUCT) - retain.record_mean(OVERLAP) / WAGLE_GAMMA).abs()


def _integrated(units: Units) -> Tensor:
    return units.record_mean(INTEGRATED)


@criterion(needs="integrated_gradients", target="probability", importance=_integrated)
def integrated_gradients(measured: Measured) -> Tensor:
    """A_forget - A_retain with A = E_s[a / m · sum_k=1..m ∂P(k/m · a)/∂a]

    P is the probability of the answer, and the activations of one layer at a time are scaled from 0 to their value,
    in m = 20 steps, at the tokens that predict an answer token. m forward and backward passes per layer. The paper
    fills one mask with one token, and then keeps the neurons above .2 of the greatest that many prompts share; here
    answers have any number of tokens, whose probabilities are summed, and records are averaged.

    Source: knowledge neurons, Dai et al. 2022, arXiv 2104.08696.
    """
    return _integrated(measured.forget) - _integrated(measured.retain)


@criterion(needs="nothing")
def random(measured: Measured) -> Tensor:
    """Uniform in [0, 1), from the seed

    Source: null control.
    """
    statistics = measured.statistics
    units = int(statistics.offsets[-1])
    return torch.rand(units, generator=torch.Generator().manual_seed(measured.seed), device="cpu").to(
        statistics.values.device
    )
