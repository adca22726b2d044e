"""All units of a model side by side, and what they did on the data of one group."""

from __future__ import annotations

from torch import Tensor

from clue_fast.errors import PatchError
from clue_fast.ops import FIELDS, GRADIENT_FIELDS
from clue_fast.statistics import Statistics


class Units:
    """What the units of all sites did on one group of tokens. Every attribute is [units] float64.

    a is the activation of a unit, f the target that was differentiated; means are over the counted tokens of the
    group, or over its records where it says so.

    Args:
        statistics: what was recorded.
        group: such as "forget".

    Raises:
        PatchError: from an attribute that was not recorded.
    """

    def __init__(self, statistics: Statistics, group: str) -> None:
        self.statistics, self.group = statistics, group
        self._row = statistics.groups.index(group)

    @property
    def tokens(self) -> Tensor:
        """Number of counted tokens; the same for all units of a site."""
        widths = self.statistics.offsets.diff().to(self.statistics.count.device)
        return self.statistics.count[self._row].double().repeat_interleave(widths)

    @property
    def mean(self) -> Tensor:
        """E[a]."""
        return self._mean("sum")

    @property
    def variance(self) -> Tensor:
        """Var[a], of the population."""
        return (self._mean("square_sum") - self.mean.square()).clamp_min(0.0)

    @property
    def abs_mean(self) -> Tensor:
        """E|a|."""
        return self._mean("magnitude_sum")

    @property
    def max_abs(self) -> Tensor:
        """Greatest |a|."""
        return self.statistics.values[self._row, FIELDS.index("magnitude_max")]

    @property
    def active_fraction(self) -> Tensor:
        """Share of the tokens with a > 0."""
        return self._mean("active_count")

    @property
    def attribution(self) -> Tensor:
        """E[a·∂f/∂a]."""
        return self._gradient_mean("product_sum")

    @property
    def abs_attribution(self) -> Tensor:
        """E|a·∂f/∂a|."""
        return self._gradient_mean("product_magnitude_sum")

    @property
    def square_attribution(self) -> Tensor:
        """E[(a·∂f/∂a)²]."""
        return self._gradient_mean("product_square_sum")

    def record_mean(self, name: str) -> Tensor:
        """Mean over the records of a sum such as ``gradient_square``, see ``clue_fast.localization``."""
        sums = self.statistics.record_sums.get(name)
        if sums is None:
            names = ", ".join(self.statistics.record_sums) or "none"
            raise PatchError(f"{name!r} was not recorded; recorded over records: {names}")
        return sums[self._row] / self.statistics.records[self._row].clamp_min(1)

    def _mean(self, field: str) -> Tensor:
        return self.statistics.values[self._row, FIELDS.index(field)] / self.tokens

    def _gradient_mean(self, field: str) -> Tensor:
        if self.statistics.gradient_values is None:
            raise PatchError("no gradients were recorded; record with gradients=True and run backward")
        return self.statistics.gradient_values[self._row, GRADIENT_FIELDS.index(field)] / self.tokens
