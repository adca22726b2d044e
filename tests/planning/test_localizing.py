"""Planned statistics and operations of a localization against those of a real one, by every criterion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from clue_fast.criteria import CRITERIA
from clue_fast.criteria.blocks import deal
from clue_fast.criteria.measure import measure_batches
from clue_fast.criteria.measurements import Job
from clue_fast.criteria.passes import Batches
from clue_fast.criteria.weight_gradients import mean_gradient_recorders
from clue_fast.data import Record
from clue_fast.errors import SettingError
from clue_fast.planning.localizing import groups_of
from clue_fast.sites import find_sites, survey
from clue_fast.statistics import Statistics
from tests.planning.test_step import COUNTED

ASKED = {"forget_records": 8, "retain_records": 8, "permutations": 0, "tokens_per_batch": 16 * 32, "batch_size": 2}


def encoded(number: int, seed: int) -> list[dict[str, list[int]]]:
    """Records as planned: of 32 tokens, of which the last 20 are the answer. One lacks a token, so there is a mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(3, 512, (number, 32), generator=generator).tolist()
    rows[0].pop()
    return [{"input_ids": row, "labels": [-100] * 12 + row[12:]} for row in rows]


def measured(model: Any, criterion: str) -> Statistics:
    return measure_batches(model, Batches([encoded(8, 1), encoded(8, 2)], 0, 16 * 32, False), criterion)


@pytest.mark.parametrize(
    "criterion", ["difference", "attribution", "wanda", "fisher", "salun", "wagle", "integrated_gradients", "random"]
)
def test_operations_and_statistics(criterion, make_small, make_plan, monkeypatch):
    """To the byte, and to one in a thousand: products of a few numbers for each unit are left out."""
    monkeypatch.setenv("CLUE_FAST_BACKEND", "reference")
    model = make_small(layers=3).eval()
    found = make_plan(model, criterion=criterion, **ASKED).localization
    measured(model, criterion)  # what comes behind the head is found out in the first pass
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        statistics = measured(model, criterion)
    kept = [*statistics.tensors(), statistics.skipped, statistics.offsets]
    assert found.statistics == sum(tensor.nbytes for tensor in kept)
    # Where layers are fused, both forwards are first tried on three tokens.
    probed = 3 * 2 * 2 * 3 * 3 * 128 * 512 if CRITERIA[criterion].measurement.live else 0
    assert found.flop == pytest.approx(counter.get_total_flops() - probed, rel=1e-3)
    assert (found.flop > 0) == (criterion != "random")


def test_a_part_of_the_layers(make_small, make_plan, monkeypatch):
    """Nothing runs backward below the upper third, and only its units have statistics."""
    monkeypatch.setenv("CLUE_FAST_BACKEND", "reference")
    model = make_small(layers=3).eval()
    found = make_plan(model, criterion="attribution", layers=(0.6, 1.0), **ASKED).localization
    sites, chosen = survey(model).between(0.6, 1.0), CRITERIA["attribution"]
    assert len(sites.sites) == 1

    def measure() -> Statistics:
        batches = Batches([encoded(8, 1), encoded(8, 2)], 0, 16 * 32, False)
        job = Job(model, sites, batches, "log_odds", None, chosen.reads)
        return chosen.measurement.record(job).statistics

    measure()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        statistics = measure()
    kept = [*statistics.tensors(), statistics.skipped, statistics.offsets]
    assert found.statistics == sum(tensor.nbytes for tensor in kept)
    assert found.flop == pytest.approx(counter.get_total_flops() - 2 * 2 * 3 * 3 * 128 * 512, rel=1e-3)


def test_a_user_s_criterion_is_planned_by_what_it_needs(make_small, make_plan):
    found = {
        name: make_plan(make_small(layers=1), criterion=name, **ASKED).localization
        for name in ("difference", "welch", "attribution", "forget_attribution")
    }
    assert found["welch"] == found["difference"]
    assert found["forget_attribution"] == found["attribution"]


def test_blocks_of_records(make_small, make_plan):
    """Exchanges of labels need statistics by block, of which there are at most 18."""
    records = [[Record("", f"{group} {number}") for number in range(many)] for group, many in enumerate((10, 37))]
    criterion = CRITERIA["difference"]
    assert groups_of(criterion, 10, 37, 30) == len(deal(*records, 5)) == 18
    assert groups_of(criterion, 10, 37, 0) == groups_of(CRITERIA["salun"], 10, 37, 30) == 2
    more, less = (
        make_plan(make_small(layers=1), criterion="difference", **ASKED | {"permutations": n}) for n in (30, 0)
    )
    assert more.localization.statistics > 7 * less.localization.statistics


@pytest.mark.parametrize("criterion", ["difference", "attribution"])
def test_the_peak_of_a_pass(criterion, make_small, make_plan):
    """Of one batch, as a CPU allocates it, beside statistics that are planned to the byte: to 6 %.

    Recording has partial sums of its own, which are larger beside 512 tokens than beside the thousands of a model.
    """
    model = make_small(layers=6).eval()
    plan = make_plan(model, criterion=criterion, **ASKED)
    measured(model, criterion)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        measured(model, criterion)
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        now += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, now)
    footprint = plan.localization_footprint
    assert footprint.peak - footprint.weights == pytest.approx(most, rel=0.06)
    assert footprint.peak == footprint.weights + footprint.statistics + plan.localization.peak


def test_what_mean_gradients_hold(make_small, make_plan, monkeypatch):
    """Two gradients of every weight of the units, in float32, or passes where they are more than fits."""
    model = make_small(layers=3)
    held = 2 * 4 * 3 * 3 * 128 * 512
    found = make_plan(model, criterion="salun", **ASKED).localization
    assert (found.held, found.passes) == (held, 1)
    monkeypatch.setattr("clue_fast.planning.localizing.GRADIENT_BYTES", held // 3)
    further = make_plan(model, criterion="salun", **ASKED).localization
    assert further.passes == 3 and found.flop < further.flop < 3 * found.flop
    recorders = mean_gradient_recorders(model, Statistics(find_sites(model), ""), held // 3)
    assert len(list(recorders)) == further.passes


def test_refuses_what_is_not_known_before(make_small, make_plan):
    with pytest.raises(SettingError, match="'circuit' cannot be planned: how often it runs the model"):
        make_plan(make_small(layers=3), criterion="circuit", **ASKED)
