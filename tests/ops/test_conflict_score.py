from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.ops import CRITERIA_OPS, conflict_score
from clue_fast.ops import backend as backends

OPERATOR = "conflict_score"
WIDTHS = [7, 1, 64, 431]  # one site is one unit, one ends inside a vector
PROPERTY = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Recording:
    """Statistics of made-up sites, each with token counts of its own."""

    def __init__(self, widths: list[int] = WIDTHS, groups: int = 2, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        units, sites = sum(widths), len(widths)
        self.offsets = torch.tensor([0, *widths]).cumsum(0)
        self.count = torch.randint(2, 50, (groups, sites), generator=generator)
        self.statistics = torch.full((groups, 5, units), float("nan"), dtype=torch.float64)
        self.gradient_statistics = torch.full((groups, 3, units), float("nan"), dtype=torch.float64)
        for g in range(groups):
            for site in range(sites):
                units_here = slice(int(self.offsets[site]), int(self.offsets[site + 1]))
                shape = (int(self.count[g, site]), widths[site])
                a = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3 * g
                p = a * torch.randn(shape, generator=generator, dtype=torch.float64)
                self.statistics[g, :, units_here] = torch.stack(
                    [a.sum(0), a.square().sum(0), a.abs().sum(0), a.abs().amax(0), (a > 0).double().sum(0)]
                )
                self.gradient_statistics[g, :, units_here] = torch.stack([p.sum(0), p.abs().sum(0), p.square().sum(0)])

    def score(self, criterion: str, backend: str | None, device: torch.device | str = "cpu") -> Tensor:
        arguments = (x.to(device) for x in (self.statistics, self.count, self.offsets))
        gradient = self.gradient_statistics.to(device) if "attribution" in criterion else None
        return conflict_score(*arguments, criterion, gradient_statistics=gradient, backend=backend).cpu()

    def expected(self, criterion: str) -> list[float]:
        """The definition, a unit at a time, in plain Python."""
        scores = []
        sites = len(self.offsets) - 1
        for site in range(sites):
            n_f, n_r = self.count[:2, site].tolist()
            for unit in range(int(self.offsets[site]), int(self.offsets[site + 1])):
                f, r = self.statistics[0, :, unit].tolist(), self.statistics[1, :, unit].tolist()
                mean_f, mean_r = f[0] / n_f, r[0] / n_r
                var_f = max(f[1] / n_f - mean_f**2, 0.0)
                var_r = max(r[1] / n_r - mean_r**2, 0.0)
                p_f, p_r = self.gradient_statistics[:2, 1, unit].tolist()
                scores.append(
                    {
                        "difference": abs(mean_f - mean_r) / math.sqrt((var_f + var_r) / 2 + 1e-12),
                        "signed_difference": (mean_f - mean_r) / math.sqrt((var_f + var_r) / 2 + 1e-12),
                        "welch": abs(mean_f - mean_r) / math.sqrt(var_f / (n_f - 1) + var_r / (n_r - 1)),
                        "ratio": (f[2] / n_f) / (r[2] / n_r + 0.01),
                        "attribution": p_f / n_f - p_r / n_r,
                        "forget_attribution": p_f / n_f,
                    }[criterion]
                )
        return scores


def assert_scores(actual: Tensor, expected: list[float], scale: float = 0.0) -> None:
    """Float64 inside, one rounding to float32 at the end, and room for one more; scale: of what cancels."""
    assert actual.dtype == torch.float32
    truth = torch.tensor(expected, dtype=torch.float64)
    assert ((actual.double() - truth).abs() <= 2 * 2.0**-24 * truth.abs() + 2.0**-48 * scale).all()


@pytest.mark.parametrize("criterion", CRITERIA_OPS)
@pytest.mark.parametrize("groups", [2, 4])
def test_formulas(backend: str, device: torch.device, criterion: str, groups: int) -> None:
    recording = Recording(groups=groups)
    assert_scores(recording.score(criterion, backend, device), recording.expected(criterion), scale=10.0)


@pytest.mark.parametrize("widths", [[1], [0, 5, 0], [3] * 20])
def test_sites(backend: str, device: torch.device, widths: list[int]) -> None:
    recording = Recording(widths)
    for criterion in CRITERIA_OPS:
        assert_scores(recording.score(criterion, backend, device), recording.expected(criterion), scale=10.0)


def test_statistics_may_be_a_range_of_a_larger_tensor(backend: str, device: torch.device) -> None:
    recording = Recording()
    expected = recording.score("difference", backend, device)
    wide = torch.full((2, 5, sum(WIDTHS) + 9), float("nan"), dtype=torch.float64)
    wide[..., 4:-5] = recording.statistics
    actual = conflict_score(
        wide.to(device)[..., 4:-5],
        recording.count.to(device),
        recording.offsets.to(device),
        "difference",
        backend=backend,
    )
    assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("criterion", CRITERIA_OPS)
def test_launch_writes_every_score(backend: str, device: torch.device, criterion: str) -> None:
    recording = Recording()
    whole = torch.full((sum(WIDTHS) + 6,), float("nan"), device=device)
    out = whole[2:-4]
    backends.launch(OPERATOR, "conflict_score", device, backend)(
        recording.statistics.to(device),
        recording.gradient_statistics.to(device),
        recording.count.to(device),
        recording.offsets.to(device),
        criterion,
        out,
    )
    assert out.isfinite().all()
    assert whole[:2].isnan().all() and whole[-4:].isnan().all()


def test_units_without_spread(backend: str, device: torch.device) -> None:
    """Constant activations: equal ones score 0, unequal ones |difference| / 1e-6; never a negative variance."""
    recording = Recording([4])
    recording.count[:] = 3
    constants = torch.tensor([[0.0, 0.1, 0.1, 2.0], [0.0, 0.1, 0.3, 2.0]], dtype=torch.float64)
    recording.statistics[:, 0] = 3 * constants
    recording.statistics[:, 1] = 3 * constants.square() * (1 - 1e-9)  # rounded down: variance below zero
    scores = recording.score("difference", backend, device)
    assert torch.equal(scores[[0, 1, 3]], torch.zeros(3))
    assert scores[2].item() == pytest.approx(0.2 / 1e-6, rel=1e-6)
    assert torch.equal(recording.score("signed_difference", backend, device), -scores)
    assert recording.score("welch", backend, device)[2].item() == pytest.approx(0.2 / 1e-12, rel=1e-6)


@pytest.mark.parametrize("criterion", CRITERIA_OPS)
def test_nan_and_missing_groups_are_not_hidden(backend: str, device: torch.device, criterion: str) -> None:
    recording = Recording([5, 6])
    recording.statistics[0, :, 2] = math.nan
    recording.gradient_statistics[0, :, 2] = math.nan
    missing = 0 if criterion == "forget_attribution" else 1  # which reads one group only
    recording.statistics[missing, :, 5:] = 0
    recording.gradient_statistics[missing, :, 5:] = 0
    recording.count[missing, 1] = 0
    finite = recording.score(criterion, backend, device).isfinite()
    assert finite.tolist() == [unit != 2 and unit < 5 for unit in range(11)]


@PROPERTY
@given(seed=st.integers(0, 10_000), widths=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_swapping_forget_and_retain(backend: str, device: torch.device, seed: int, widths: list[int]) -> None:
    recording = Recording(widths, seed=seed)
    scores = {c: recording.score(c, backend, device) for c in ("difference", "attribution")}
    for name in ("statistics", "gradient_statistics", "count"):
        setattr(recording, name, getattr(recording, name).flip(0))
    assert torch.equal(recording.score("difference", backend, device), scores["difference"])
    assert torch.equal(recording.score("attribution", backend, device), -scores["attribution"])
    assert (scores["difference"] >= 0).all()


@PROPERTY
@given(seed=st.integers(0, 10_000), exponent=st.integers(-3, 6))
def test_difference_does_not_depend_on_the_scale_of_a_unit(
    backend: str, device: torch.device, seed: int, exponent: int
) -> None:
    recording = Recording([9], seed=seed)
    before = recording.score("difference", backend, device)
    recording.statistics[:, 0] *= 2.0**exponent
    recording.statistics[:, 1] *= 4.0**exponent
    assert torch.allclose(recording.score("difference", backend, device), before, rtol=1e-6)


def test_opcheck(backend: str, device: torch.device) -> None:
    recording = Recording([3, 4])
    for criterion in CRITERIA_OPS:
        gradient = recording.gradient_statistics.to(device) if "attribution" in criterion else None
        torch.library.opcheck(
            torch.ops.clue_fast.conflict_score.default,
            (
                recording.statistics.to(device),
                gradient,
                recording.count.to(device),
                recording.offsets.to(device),
                criterion,
                backend,
            ),
        )


@pytest.mark.slow
def test_compile(backend: str, device: torch.device) -> None:
    recording = Recording()
    eager = recording.score("difference", backend, device)
    function = torch.compile(conflict_score, fullgraph=True)
    arguments = (x.to(device) for x in (recording.statistics, recording.count, recording.offsets))
    assert torch.equal(function(*arguments, "difference", backend=backend).cpu(), eager)


def test_bad_input() -> None:
    recording = Recording([3, 4])
    statistics, count, offsets = recording.statistics, recording.count, recording.offsets
    with pytest.raises(UnknownNameError, match="unknown criterion 'entropy'"):
        conflict_score(statistics, count, offsets, "entropy")
    with pytest.raises(ValueError, match="needs gradient_statistics"):
        conflict_score(statistics, count, offsets, "attribution")
    with pytest.raises(ValueError, match="groups >= 2"):
        conflict_score(statistics[:1], count[:1], offsets, "ratio")
    with pytest.raises(ValueError, match="float64"):
        conflict_score(statistics.float(), count, offsets, "ratio")
    with pytest.raises(ValueError, match="int64"):
        conflict_score(statistics, count.double(), offsets, "ratio")
    with pytest.raises(ValueError, match=r"offsets \[sites \+ 1\]"):
        conflict_score(statistics, count, offsets[:-1], "ratio")
