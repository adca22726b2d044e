"""The score of every unit of every site from their statistics, by a closed formula, in one call.

The operators that add to the statistics of a site write the same scores of its units in the same launch, where they
are given a `Scoring`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.ops import backend as backends
from clue_fast.ops.accumulators import FIELDS, GRADIENT_FIELDS
from clue_fast.ops.backend import define

VARIANCE_FLOOR = 1e-12
RATIO_FLOOR = 0.01
ERROR_FLOOR = 1e-24  # of welch: below what float32 activations can differ by
FORGET, RETAIN = 0, 1  # rows of the groups 1 and 2


# The definition: closed forms in plain PyTorch, float64, from the sums [2, fields, units] and the numbers of counted
# tokens [2, units or 1] of forget and retain to one score a unit.


def _mean_and_variance(sums: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    mean = sums[:, FIELDS.index("sum")] / tokens
    return mean, (sums[:, FIELDS.index("square_sum")] / tokens - mean.square()).clamp(min=0)


def _signed_difference(sums: Tensor, tokens: Tensor) -> Tensor:
    mean, variance = _mean_and_variance(sums, tokens)
    return (mean[FORGET] - mean[RETAIN]) / (variance.mean(0) + VARIANCE_FLOOR).sqrt()


def _welch(sums: Tensor, tokens: Tensor) -> Tensor:
    mean, variance = _mean_and_variance(sums, tokens)
    square_error = (variance / (tokens - 1).clamp(min=1)).sum(0)
    return (mean[FORGET] - mean[RETAIN]).abs() / square_error.clamp(min=ERROR_FLOOR).sqrt()


def _ratio(sums: Tensor, tokens: Tensor) -> Tensor:
    magnitude = sums[:, FIELDS.index("magnitude_sum")] / tokens
    return magnitude[FORGET] / (magnitude[RETAIN] + RATIO_FLOOR)


def _attribution(sums: Tensor, tokens: Tensor) -> Tensor:
    effect = sums[:, GRADIENT_FIELDS.index("product_magnitude_sum")] / tokens
    return effect[FORGET] - effect[RETAIN]


def _forget_attribution(sums: Tensor, tokens: Tensor) -> Tensor:
    return sums[FORGET, GRADIENT_FIELDS.index("product_magnitude_sum")] / tokens[FORGET]


@dataclass(frozen=True)
class ClosedForm:
    """A criterion that needs nothing but the accumulators of a unit.

    Attributes:
        function: its definition.
        fields: those that it reads.
        gradients: whether it reads the sums of GRADIENT_FIELDS and not those of FIELDS.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    fields: tuple[str, ...]
    gradients: bool = False


_MOMENTS = ("sum", "square_sum")
_EFFECT = ("product_magnitude_sum",)
CLOSED_FORMS = {
    "difference": ClosedForm(lambda sums, tokens: _signed_difference(sums, tokens).abs(), _MOMENTS),
    "signed_difference": ClosedForm(_signed_difference, _MOMENTS),
    "welch": ClosedForm(_welch, _MOMENTS),
    "ratio": ClosedForm(_ratio, ("magnitude_sum",)),
    "attribution": ClosedForm(_attribution, _EFFECT, gradients=True),
    "forget_attribution": ClosedForm(_forget_attribution, _EFFECT, gradients=True),
}
CRITERIA_OPS = tuple(CLOSED_FORMS)


def reference(
    statistics: Tensor,
    gradient_statistics: Tensor | None,
    count: Tensor,
    offsets: Tensor,
    criterion: str,
    out: Tensor,
) -> None:
    """Writes the score of every unit; the formulas are in `conflict_score`."""
    form = CLOSED_FORMS[criterion]
    source = gradient_statistics if form.gradients else statistics
    assert source is not None
    out.copy_(form.function(source[:2], count[:2].double().repeat_interleave(offsets.diff(), dim=1)))


backends.register("conflict_score", ("reference", "cpp", "triton"), {"conflict_score": reference})


# What the operators that add to statistics share.


class Scoring(NamedTuple):
    """What an operator that adds to the statistics of a site needs to write the scores of its units in the same launch.

    With a criterion that reads gradient statistics it is for eager code alone: compiled code would keep the numbers of
    tokens of its forward for its backward, whatever was counted in between.

    Attributes:
        criterion: one of CRITERIA_OPS.
        tokens: int64 [groups, 1], those counted at the site, with those that are added now.
        source: the accumulators that the criterion reads, if they are not those that the operator adds to.
        scores: float32 [units], written.
    """

    criterion: str
    tokens: Tensor
    source: Tensor | None
    scores: Tensor

    def in_backward(self) -> Scoring | None:
        """Returns that of the operator that adds to the gradient statistics, or None where that changes no score."""
        gradients = CLOSED_FORMS[self.criterion].gradients
        return Scoring(self.criterion, self.tokens, None, self.scores) if gradients else None

    def of_expert(self, expert: int, width: int) -> Scoring:
        """Returns that of one of the stacked experts, where this is of all: tokens [groups, experts]."""
        units = slice(expert * width, (expert + 1) * width)
        source = None if self.source is None else self.source[:, :, units]
        return Scoring(self.criterion, self.tokens[:, expert : expert + 1], source, self.scores[units])


SCORING = 'str criterion="", Tensor? count=None, Tensor? source=None, Tensor(s!)? scores=None'
"""The fields of a Scoring at the end of the schema of an operator that may have one."""


def checked(scoring: Scoring | None, statistics: Tensor) -> tuple[Any, ...]:
    """Returns the fields of a Scoring for the arguments of an operator that adds to these accumulators, () for None.

    Raises:
        ValueError: it does not fit the accumulators.
        UnknownNameError: no such criterion.
    """
    if scoring is None:
        return ()
    check_eager(scoring)
    criterion, tokens, source, scores = scoring
    groups, _, units = statistics.shape
    read = statistics if source is None else source
    fields = len(GRADIENT_FIELDS if CLOSED_FORMS[criterion].gradients else FIELDS)
    if groups < 2 or read.shape != (groups, fields, units) or read.dtype != torch.float64:
        raise ValueError(
            f"criterion {criterion!r} reads accumulators [groups >= 2, {fields}, {units}] float64, not "
            f"{list(read.shape)} {read.dtype}; give those that it reads as source"
        )
    if tokens.shape != (groups, 1) or tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be [{groups}, 1] int64, not {list(tokens.shape)} {tokens.dtype}")
    if scores.shape != (units,) or scores.dtype != torch.float32 or (units > 1 and scores.stride(0) != 1):
        raise ValueError(f"scores must be [{units}] float32, contiguous, not {list(scores.shape)} {scores.dtype}")
    return scoring


def check_eager(scoring: Scoring) -> Scoring:
    """Returns a Scoring; raises UnknownNameError, or ValueError if it is for eager code and this is compiled."""
    if scoring.criterion not in CLOSED_FORMS:
        raise UnknownNameError("criterion", scoring.criterion, CLOSED_FORMS)
    if CLOSED_FORMS[scoring.criterion].gradients and torch.compiler.is_compiling():
        raise ValueError(f"compiled code cannot write scores by {scoring.criterion!r}; call conflict_score afterwards")
    return scoring


def packed(fields: tuple[Any, ...]) -> Scoring | None:
    """Returns the Scoring whose fields are arguments of an operator, or None if there is none."""
    return Scoring(*fields) if fields and fields[0] else None


def reference_scores(statistics: Tensor, *fields: Any) -> None:
    """Writes the scores of the units of one site, if there is a Scoring among the arguments of a launch function."""
    scoring = packed(fields)
    if scoring is not None:
        sums = statistics if scoring.source is None else scoring.source
        scoring.scores.copy_(CLOSED_FORMS[scoring.criterion].function(sums[:2], scoring.tokens[:2].double()))


# Schema and fake, for torch.compile.


def _score(
    statistics: Tensor,
    gradient_statistics: Tensor | None,
    count: Tensor,
    offsets: Tensor,
    criterion: str,
    backend: str | None = None,
) -> Tensor:
    out = torch.empty(statistics.shape[2], dtype=torch.float32, device=statistics.device)
    launch = backends.launch("conflict_score", "conflict_score", statistics.device, backend)
    launch(statistics, gradient_statistics, count, offsets, criterion, out)
    return out


def _fake(statistics: Tensor, *_: Any) -> Tensor:
    return statistics.new_empty(statistics.shape[2], dtype=torch.float32)


define(
    "conflict_score(Tensor statistics, Tensor? gradient_statistics, Tensor count, Tensor offsets, "
    "str criterion, str? backend=None) -> Tensor",
    _score,
    _fake,
)


@torch.no_grad()
def conflict_score(
    statistics: Tensor,
    count: Tensor,
    offsets: Tensor,
    criterion: str,
    *,
    gradient_statistics: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every unit from the statistics of group 1, forget, and group 2, retain.

    difference:  |mean_f - mean_r| / sqrt((var_f + var_r) / 2 + 1e-12), the standardized difference of the
        means (Cohen 1988, with the average variance).
    signed_difference: the same with its sign.
    welch:       |mean_f - mean_r| / sqrt(var_f / (n_f - 1) + var_r / (n_r - 1)), n the numbers of tokens (Welch 1947).
    ratio:       E_f|a| / (E_r|a| + 0.01) (Pochinkov & Schoots 2024, arXiv 2403.01267).
    attribution: E_f|p| - E_r|p| with p = a * dL/da.
    forget_attribution: E_f|p|.

    E, mean and var are over the counted tokens of the group; where a group that is read has none the score is NaN.
    Computed in float64.

    Args:
        statistics: float64 [groups >= 2, len(FIELDS), units], the units of all sites side by side.
        count: int64 [groups, sites], tokens counted.
        offsets: int64 [sites + 1], where each site begins among the units, from 0 to units.
        criterion: one of CRITERIA_OPS.
        gradient_statistics: float64 [groups, len(GRADIENT_FIELDS), units]; for the attributions only.
        backend: forces one, see `clue_fast.ops.backend.choose`.

    Returns:
        float32 [units].

    Raises:
        ValueError: shapes or dtypes do not fit, or gradient_statistics is missing.
        UnknownNameError: no such criterion or backend.
        BackendError: the backend cannot run here.
    """
    _check(statistics, count, offsets, criterion, gradient_statistics)
    arguments = statistics, gradient_statistics, count, offsets, criterion, backend
    out: Tensor = backends.run("conflict_score", _score, *arguments)
    return out


def _check(
    statistics: Tensor, count: Tensor, offsets: Tensor, criterion: str, gradient_statistics: Tensor | None
) -> None:
    if criterion not in CLOSED_FORMS:
        raise UnknownNameError("criterion", criterion, CLOSED_FORMS)
    if CLOSED_FORMS[criterion].gradients and gradient_statistics is None:
        raise ValueError(f'criterion "{criterion}" needs gradient_statistics; record with gradients')
    for name, tensor, fields in (
        ("statistics", statistics, len(FIELDS)),
        ("gradient_statistics", gradient_statistics, len(GRADIENT_FIELDS)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.float64 or tensor.dim() != 3 or tensor.shape[0] < 2 or tensor.shape[1] != fields:
            shape = f"{list(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{name} must be [groups >= 2, {fields}, units] float64, not {shape}")
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            raise ValueError(f"the last dimension of {name} must be contiguous")
        if tensor.shape[2] != statistics.shape[2]:
            raise ValueError(f"{name} has {tensor.shape[2]} units, statistics has {statistics.shape[2]}")
    if count.dtype != torch.int64 or offsets.dtype != torch.int64:
        raise ValueError(f"count and offsets must be int64, not {count.dtype} and {offsets.dtype}")
    if offsets.dim() != 1 or count.shape != (statistics.shape[0], offsets.numel() - 1):
        raise ValueError(
            f"count must be [groups, sites] and offsets [sites + 1], not {list(count.shape)} and {list(offsets.shape)}"
        )
