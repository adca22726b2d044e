"""Scores that an operator writes in the launch that adds to the statistics: those of `conflict_score` afterwards.

They are equal bit for bit, since both run the same closed form of their backend, on the same sums, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from clue_fast.errors import UnknownNameError
from clue_fast.ops import (
    CLOSED_FORMS,
    CRITERIA_OPS,
    Scoring,
    channel_attribution,
    channel_statistics,
    conflict_score,
    gated_activation,
)
from clue_fast.ops.expert_statistics import add_statistics
from clue_fast.ops.unit_attribution import watch_gradient

OPERATOR = "channel_statistics"
PROPERTY = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
GRADIENT_CRITERIA = [name for name, form in CLOSED_FORMS.items() if form.gradients]
PADDING = 3


class Accumulators:
    """Statistics of 3 groups at one site with a few tokens each, and scores that are NaN between more of them."""

    def __init__(self, channels: int, device: torch.device, experts: int = 1) -> None:
        units = channels * experts
        self.device, self.channels = device, channels
        self.count = torch.randint(2, 5, (3, experts)).to(device)
        spread = self.count.repeat_interleave(channels, 1)[:, None].double()
        self.statistics = torch.rand(3, 5, units, dtype=torch.float64, device=device) * spread
        self.gradient_statistics = torch.rand(3, 3, units, dtype=torch.float64, device=device) * spread
        self.kept = torch.full((units + 2 * PADDING,), math.nan, device=device)
        self.scores = self.kept[PADDING:-PADDING]

    def scoring(self, criterion: str, backward: bool = False) -> Scoring:
        gradients = CLOSED_FORMS[criterion].gradients and not backward
        return Scoring(criterion, self.count, self.gradient_statistics if gradients else None, self.scores)

    def add(self, group: Tensor) -> None:
        """Counts the tokens that an operator is about to add."""
        for row in range(3):
            self.count[row] += (group == row + 1).sum()

    def expected(self, criterion: str, backend: str) -> Tensor:
        experts = self.count.shape[1]
        offsets = torch.arange(experts + 1, device=self.device) * self.channels
        gradients = self.gradient_statistics if CLOSED_FORMS[criterion].gradients else None
        return conflict_score(
            self.statistics, self.count, offsets, criterion, gradient_statistics=gradients, backend=backend
        )

    def check(self, criterion: str, backend: str) -> None:
        """Every score was written, and nothing beside them; they are poisoned again."""
        assert self.scores.isfinite().all()
        assert self.kept[:PADDING].isnan().all() and self.kept[-PADDING:].isnan().all()
        assert torch.equal(self.scores, self.expected(criterion, backend))
        self.kept.fill_(math.nan)


def activations(tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    group = torch.randint(0, 5, (tokens,), dtype=torch.int8)  # 4 is no row, and not counted
    return torch.randn(tokens, channels).to(dtype).to(device), group.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", CRITERIA_OPS)
def test_statistics(backend: str, device: torch.device, criterion: str, dtype: torch.dtype) -> None:
    kept = Accumulators(45, device)
    for tokens in (1, 70):
        x, group = activations(tokens, 45, dtype, device)
        kept.add(group)
        channel_statistics(x, group, kept.statistics, scoring=kept.scoring(criterion), backend=backend)
        kept.check(criterion, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
def test_attribution(backend: str, device: torch.device, criterion: str, dtype: torch.dtype) -> None:
    kept = Accumulators(45, device)
    for tokens in (1, 70):
        x, group = activations(tokens, 45, dtype, device)
        kept.add(group)
        scoring = kept.scoring(criterion, backward=True)
        channel_attribution(x, x + 1, group, kept.gradient_statistics, scoring=scoring, backend=backend)
        kept.check(criterion, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA_OPS)
def test_gated_activation(backend: str, device: torch.device, criterion: str, dtype: torch.dtype) -> None:
    """Forward writes the scores, with the gradient statistics of before; backward does where it adds to them."""
    kept = Accumulators(45, device)
    gate, group = activations(70, 45, dtype, device)
    up = torch.randn_like(gate).requires_grad_()
    kept.add(group)
    h = gated_activation(
        gate,
        up,
        group=group,
        statistics=kept.statistics,
        gradient_statistics=kept.gradient_statistics,
        scoring=kept.scoring(criterion),
        backend=backend,
    )
    kept.check(criterion, backend)
    assert torch.equal(h, gated_activation(gate, up, backend=backend))
    h.sum().backward()
    if CLOSED_FORMS[criterion].gradients:
        kept.check(criterion, backend)
    else:
        assert kept.kept.isnan().all()


@pytest.mark.parametrize("criterion", GRADIENT_CRITERIA)
def test_gated_activation_run_again(backend: str, device: torch.device, criterion: str) -> None:
    """Under gradient checkpointing the second forward records nothing, and its backward all."""
    kept = Accumulators(20, device)
    gate, group = activations(9, 20, torch.float32, device)
    arguments = {"group": group, "gradient_statistics": kept.gradient_statistics, "backend": backend}
    h = gated_activation(gate.requires_grad_(), gate + 1, scoring=kept.scoring(criterion), **arguments)
    assert kept.kept.isnan().all()
    h.sum().backward()
    kept.check(criterion, backend)


@pytest.mark.parametrize("criterion", ["welch", "attribution"])
def test_experts(backend: str, device: torch.device, criterion: str) -> None:
    """Each expert with its own count; those of one without tokens stay as they are."""
    kept = Accumulators(12, device, experts=3)
    h, group = activations(10, 12, torch.float32, device)
    bounds = torch.tensor([0, 4, 4, 10], device=device)
    for expert, rows in ((0, slice(0, 4)), (2, slice(4, 10))):
        for row in range(3):
            kept.count[row, expert] += (group[rows] == row + 1).sum()
    stale = kept.expected(criterion, backend)[12:24]
    kept.scores[12:24] = stale
    scoring = kept.scoring(criterion)
    add_statistics(h, group, kept.statistics, bounds, backend, scoring)
    kept.check(criterion, backend)
    if scoring.in_backward() is None:
        return
    kept.scores[12:24] = stale
    h.requires_grad_()
    watched = watch_gradient(h, group, kept.gradient_statistics, 1, bounds, backend, scoring.in_backward())
    (watched * torch.randn_like(watched)).sum().backward()
    kept.check(criterion, backend)


def test_heads(backend: str, device: torch.device) -> None:
    """a·∂L/∂a of a head is the sum over its channels."""
    kept = Accumulators(6, device)
    h, group = activations(10, 24, torch.float32, device)
    scoring = kept.scoring("attribution").in_backward()
    watched = watch_gradient(h.requires_grad_(), group, kept.gradient_statistics, 4, None, backend, scoring)
    (watched * torch.randn_like(watched)).sum().backward()
    kept.check("attribution", backend)


@pytest.mark.parametrize("criterion", CRITERIA_OPS)
def test_without_tokens_nothing_is_written(backend: str, device: torch.device, criterion: str) -> None:
    kept = Accumulators(20, device)
    before = kept.statistics.clone(), kept.gradient_statistics.clone()
    x, group = activations(0, 20, torch.float32, device)
    scoring = kept.scoring(criterion)
    channel_statistics(x, group, kept.statistics, scoring=scoring, backend=backend)
    gated_activation(x, x, group=group, statistics=kept.statistics, scoring=scoring, backend=backend)
    if CLOSED_FORMS[criterion].gradients:
        scoring = kept.scoring(criterion, backward=True)
        channel_attribution(x, x, group, kept.gradient_statistics, scoring=scoring, backend=backend)
    assert kept.kept.isnan().all()
    assert torch.equal(before[0], kept.statistics) and torch.equal(before[1], kept.gradient_statistics)


def test_statistics_do_not_depend_on_scoring(backend: str, device: torch.device) -> None:
    with_scores, without = Accumulators(45, device), Accumulators(45, device)
    x, group = activations(70, 45, torch.float32, device)
    without.statistics.copy_(with_scores.statistics)
    channel_statistics(x, group, without.statistics, backend=backend)
    channel_statistics(x, group, with_scores.statistics, scoring=with_scores.scoring("difference"), backend=backend)
    assert torch.equal(with_scores.statistics, without.statistics)


def test_same_bits_on_every_number_of_threads(backend: str, device: torch.device, two_threads: None) -> None:
    shape = (300, 40) if backend == "triton" else (300, 1431)
    x, group = activations(*shape, torch.float32, device)
    kept, found = Accumulators(shape[1], device), []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        statistics = kept.statistics.clone()
        channel_statistics(x, group, statistics, scoring=kept.scoring("welch"), backend=backend)
        found.append(kept.scores.clone())
    if backend != "reference":  # PyTorch's own sums may split by thread
        assert torch.equal(*found)


def test_from_the_definition(backend: str, device: torch.device) -> None:
    """Tokens given in two passes: the standardized difference of their means, worked out token by token."""
    kept = Accumulators(4, device)
    kept.statistics.zero_()
    kept.count.zero_()
    seen: dict[int, list[list[float]]] = {1: [], 2: []}
    for tokens in (6, 9):
        x, group = activations(tokens, 4, torch.float32, device)
        group = torch.arange(tokens, dtype=torch.int8).remainder(3).to(device)
        kept.add(group)
        channel_statistics(x, group, kept.statistics, scoring=kept.scoring("signed_difference"), backend=backend)
        for row, member in zip(x.tolist(), group.tolist(), strict=True):
            if member:
                seen[member].append(row)
    for channel, score in enumerate(kept.scores.tolist()):
        values = [[row[channel] for row in seen[member]] for member in (1, 2)]
        means = [sum(v) / len(v) for v in values]
        variances = [sum((a - mean) ** 2 for a in v) / len(v) for v, mean in zip(values, means, strict=True)]
        expected = (means[0] - means[1]) / math.sqrt(sum(variances) / 2 + 1e-12)
        assert score == pytest.approx(expected, rel=1e-5)


def test_nan_is_not_hidden(backend: str, device: torch.device) -> None:
    kept = Accumulators(20, device)
    x, group = activations(30, 20, torch.float32, device)
    x[7, 3], group[7] = math.nan, 1
    kept.add(group)
    for criterion in ("difference", "ratio", "welch"):
        statistics = kept.statistics.clone()
        channel_statistics(x, group, statistics, scoring=kept.scoring(criterion), backend=backend)
        assert torch.nonzero(kept.scores.isnan()).flatten().tolist() == [3]


@PROPERTY
@given(draw=st.data(), seed=st.integers(0, 99), channels=st.integers(1, 40))
def test_any_passes(backend: str, device: torch.device, draw: st.DataObject, seed: int, channels: int) -> None:
    torch.manual_seed(seed)
    kept = Accumulators(channels, device)
    for tokens in draw.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3)):
        criterion = draw.draw(st.sampled_from(CRITERIA_OPS))
        x, group = activations(tokens, channels, draw.draw(st.sampled_from(DTYPES)), device)
        kept.add(group)
        channel_statistics(x, group, kept.statistics, scoring=kept.scoring(criterion), backend=backend)
        kept.check(criterion, backend)


def test_opcheck(backend: str, device: torch.device) -> None:
    x, group = activations(12, 10, torch.float32, device)
    for criterion in ("ratio", "attribution"):
        kept = Accumulators(10, device)
        fields = kept.scoring(criterion)
        torch.library.opcheck(
            torch.ops.clue_fast.channel_statistics.default, (x, group, kept.statistics, backend, *fields)
        )
        arguments = (x, x + 1, "silu", group, kept.statistics, None, backend, "all", "all", *fields)
        torch.library.opcheck(torch.ops.clue_fast.gated_activation_record.default, arguments)


@pytest.mark.slow
def test_compile(backend: str, device: torch.device) -> None:
    x, group = activations(20, 12, torch.float32, device)
    x.requires_grad_()

    def run(x: Tensor, kept: Accumulators, criterion: str) -> Tensor:
        statistics, gradient_statistics = kept.statistics, kept.gradient_statistics
        scoring = Scoring(criterion, kept.count, None, kept.scores)
        arguments = {"group": group, "statistics": statistics, "scoring": scoring, "backend": backend}
        h = gated_activation(x * 2, x + 1, gradient_statistics=gradient_statistics, **arguments)
        channel_statistics(h * 3, **arguments)
        return h * 2

    results = []
    for function in (run, torch.compile(run, fullgraph=True)):
        torch.manual_seed(1)
        kept = Accumulators(12, device)
        y = function(x, kept, "welch")
        results.append((y.detach(), kept.scores.clone(), kept.statistics, kept.gradient_statistics))
        kept.check("welch", backend)
        y.sum().backward()
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)
    with pytest.raises(Exception, match="compiled code cannot write scores by 'attribution'"):
        torch.compile(run, fullgraph=True)(x, kept, "attribution")


def bad(change: Callable[[dict[str, Any]], Any]) -> None:
    """Records with a scoring, the fields of which were changed."""
    kept = Accumulators(4, torch.device("cpu"))
    x, group = activations(6, 4, torch.float32, kept.device)
    fields = kept.scoring("difference")._asdict()
    fields.update(change(fields))
    before = kept.statistics.clone()
    try:
        channel_statistics(x, group, kept.statistics, scoring=Scoring(**fields))
    finally:
        assert torch.equal(before, kept.statistics) and kept.kept.isnan().all()


def test_bad_input() -> None:
    with pytest.raises(UnknownNameError, match="unknown criterion 'entropy'"):
        bad(lambda _: {"criterion": "entropy"})
    with pytest.raises(ValueError, match=r"'attribution' reads accumulators \[groups >= 2, 3, 4\].*as source"):
        bad(lambda _: {"criterion": "attribution"})
    with pytest.raises(ValueError, match=r"tokens must be \[3, 1\] int64"):
        bad(lambda fields: {"tokens": fields["tokens"].double()})
    with pytest.raises(ValueError, match=r"scores must be \[4\] float32"):
        bad(lambda fields: {"scores": fields["scores"][:3]})
    with pytest.raises(ValueError, match=r"scores must be \[4\] float32, contiguous"):
        bad(lambda _: {"scores": torch.zeros(8)[::2]})
    one = Accumulators(4, torch.device("cpu"))
    x, group = activations(6, 4, torch.float32, one.device)
    with pytest.raises(ValueError, match="groups >= 2"):
        scoring = Scoring("ratio", one.count[:1], None, one.scores)
        channel_statistics(x, group, one.statistics[:1], scoring=scoring)
