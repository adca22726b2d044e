"""The criteria of the field, one function each.

E is the mean over the counted tokens of a set, E_s that over its records s, a the activation of a unit, and
p = a·∂f/∂a its first-order effect on the target f. A unit u owns the weights w_u: its rows and columns of the modules
around it; g_u(s) is the gradient of the loss of record s, the mean over its answer tokens, with respect to them.
Formulas that the field has for single weights are summed over the weights of a unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clue_fast import ops
from clue_fast.localization.criteria import Measured, criterion
from clue_fast.localization.integrated_gradients import INTEGRATED
from clue_fast.localization.units import Units, directions
from clue_fast.localization.weight_gradients import NORM, PRODUCT, SQUARE
from clue_fast.localization.weight_inputs import WEIGHTED_INPUT

FISHER_FLOOR = 1e-12
VARIANCE_FLOOR = 1e-12
ERROR_FLOOR = 1e-24  # below what float32 activations can differ by
WAGLE_GAMMA = 1.0


def _launch(measured: Measured, name: str) -> Tensor:
    """One launch over all units of the model."""
    statistics = measured.statistics
    return ops.conflict_score(
        statistics.values,
        statistics.count,
        statistics.offsets.to(statistics.values.device),
        name,
        gradient_statistics=statistics.gradient_values if name == "attribution" else None,
        backend=measured.backend,
    )


@criterion(needs="activations")
def difference(measured: Measured) -> Tensor:
    """|E_forget[a] - E_retain[a]| / sqrt((Var_forget[a] + Var_retain[a]) / 2)

    Large for units that act differently on the two sets, whichever is higher; small where both are high.

    Source: standardized mean difference, Cohen 1988; the conflict of units, after CLUE, arXiv 2509.20977.
    """
    return _launch(measured, "difference")


@criterion(needs="activations")
def signed_difference(measured: Measured) -> Tensor:
    """(E_forget[a] - E_retain[a]) / sqrt((Var_forget[a] + Var_retain[a]) / 2)

    Large for units that are higher on forget data only.

    Source: standardized mean difference, Cohen 1988.
    """
    forget, retain = measured.forget, measured.retain
    spread = ((forget.variance + retain.variance) / 2 + VARIANCE_FLOOR).sqrt()
    return (forget.mean - retain.mean) / spread


@criterion(needs="activations")
def welch(measured: Measured) -> Tensor:
    """|E_forget[a] - E_retain[a]| / sqrt(Var_forget[a] / n_forget + Var_retain[a] / n_retain)

    n are the numbers of counted tokens: the difference in units of its standard error, with unbiased variances.

    Source: Welch 1947, The generalization of Student's problem, Biometrika 34.
    """
    forget, retain = measured.forget, measured.retain
    square_error = torch.zeros_like(forget.mean)
    for units in (forget, retain):
        square_error += units.variance / (units.tokens - 1).clamp_min(1.0)
    return (forget.mean - retain.mean).abs() / square_error.clamp_min(ERROR_FLOOR).sqrt()


@criterion(needs="activations", importance=lambda units: units.abs_mean)
def ratio(measured: Measured) -> Tensor:
    """E_forget|a| / (E_retain|a| + 0.01)

    Source: Pochinkov & Schoots 2024, arXiv 2403.01267.
    """
    return _launch(measured, "ratio")


@criterion(needs="gradients", target="log_odds", importance=lambda units: units.abs_attribution)
def attribution(measured: Measured) -> Tensor:
    """E_forget|p| - E_retain|p|

    f is the log-odds of the answer tokens unless another target is asked for: where an answer is memorized, the
    gradient of its loss is nearly noise.

    Source: first-order Taylor importance, Molchanov et al. 2017, arXiv 1611.06440.
    """
    return _launch(measured, "attribution")


def _fisher(units: Units) -> Tensor:
    return units.record_mean(SQUARE)


@criterion(needs="weight_gradients", target="loss", importance=_fisher)
def fisher(measured: Measured) -> Tensor:
    """F_forget / F_retain with F = E_s |g_u(s)|²

    F is the diagonal of the empirical Fisher information summed over the weights of the unit. The paper dampens
    where F_forget > alpha F_retain, so that its order is that of the ratio.

    Source: selective synaptic dampening (SSD), Foster et al. 2024, arXiv 2308.07707.
    """
    return _fisher(measured.forget) / (_fisher(measured.retain) + FISHER_FLOOR)


def _wanda(units: Units) -> Tensor:
    return units.record_mean(WEIGHTED_INPUT)


@criterion(needs="weight_inputs", importance=_wanda)
def wanda(measured: Measured) -> Tensor:
    """S_forget - S_retain with S = sum over the weights w_ij of the unit of |w_ij| sqrt(E[z_j²])

    z_j is the input that the weight multiplies; the paper has its norm over the tokens, here divided by their
    number, so that sets of different sizes compare.

    Source: Sun et al. 2024, arXiv 2306.11695, equation 1; of two sets, Wei et al. 2024, arXiv 2402.05162.
    """
    return _wanda(measured.forget) - _wanda(measured.retain)


def _saliency(units: Units) -> Tensor:
    return units.record_mean(NORM)


@criterion(needs="weight_gradients", target="loss", importance=_saliency)
def salun(measured: Measured) -> Tensor:
    """E_forget,s |g_u(s)|

    The paper takes the magnitude of the gradient of the whole forget set for each weight. The norm of that gradient
    would need all of it at once; here the norm is taken of each record, inside its backward pass, and averaged.

    Source: saliency unlearning, Fan et al. 2024, arXiv 2310.12508.
    """
    return _saliency(measured.forget)


@criterion(needs="weight_gradients", target="loss", importance=lambda units: units.record_mean(PRODUCT).abs())
def wagle(measured: Measured) -> Tensor:
    """|w_u·g_forget - (1/γ) sum_k (ŵ_k·g_forget) (ŵ_k·g_retain)| with γ = 1

    g is the gradient of the mean loss of a set with respect to w_u, and ŵ_k are the weight vectors that make up w_u
    (its rows and columns: gate, up and down), at length 1. The paper has w_i g_forget,i - (1/γ) g_retain,i g_forget,i
    for weight i. Summed over a unit, the first term is w_u·g_forget; of a column of down_proj it is sum_t a ∂L/∂a,
    of a row of up_proj the same, of a row of gate_proj sum_t y ∂L/∂y with y its output. The second is the inner
    product of two gradients, of which only the part along the unit's own weight vectors is taken: it needs one number
    a vector instead of both gradients.

    Source: Jia et al. 2024, arXiv 2410.17509.
    """
    forget, retain = measured.forget, measured.retain
    overlap = (directions(forget) * directions(retain)).sum(0)
    return (forget.record_mean(PRODUCT) - overlap / WAGLE_GAMMA).abs()


def _integrated(units: Units) -> Tensor:
    return units.record_mean(INTEGRATED)


@criterion(needs="integrated_gradients", target="probability", importance=_integrated)
def integrated_gradients(measured: Measured) -> Tensor:
    """A_forget - A_retain with A = E_s[a / m · sum_k=1..m ∂P(k/m · a)/∂a]

    P is the probability of the answer, and the activations of one layer at a time are scaled from 0 to their value,
    in m = 20 steps, at the tokens that predict an answer token. m forward and backward passes a layer.

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
    return torch.rand(units, generator=torch.Generator().manual_seed(measured.seed)).to(statistics.values.device)
