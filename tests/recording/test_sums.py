"""Only the statistics that are asked for: those have the bits that they have among all, the others are never zeros."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import clue_fast
from clue_fast.criteria.registry import CRITERIA
from clue_fast.errors import PatchError, UnknownNameError
from clue_fast.ops import CLOSED_FORMS, STATISTICS, fields_of
from clue_fast.recording import Patched
from clue_fast.statistics import Statistics
from tests.recording.test_recording import IDS

OF_ACTIVATIONS = ("mean", "variance", "abs_mean", "max_abs", "active_fraction")
OF_GRADIENTS = ("attribution", "abs_attribution", "square_attribution")


@pytest.fixture
def patched(llama: LlamaForCausalLM) -> Patched:
    return clue_fast.patch(llama)


def record(patched: Patched, group: str, **asked: Any) -> Statistics:
    """One pass, and its backward where gradients are recorded."""
    with patched.record(group, **asked) as statistics:
        loss = patched.model(IDS, labels=IDS).loss
        if asked.get("gradients"):
            loss.backward()
    return statistics


def all_of(patched: Patched, group: str = "forget") -> dict[str, Tensor]:
    found = patched.statistics.of(patched.sites[1], group)
    return {name: getattr(found, name) for name in STATISTICS if getattr(found, name) is not None}


def check(patched: Patched, expected: dict[str, Tensor], there: set[str], group: str = "forget") -> None:
    found = patched.statistics.of(patched.sites[1], group)
    for name, value in expected.items():
        if name in there:
            assert torch.equal(getattr(found, name), value), name
        else:
            with pytest.raises(PatchError, match=rf"left out {name}; .* statistics=\('{name}',\)"):
                getattr(found, name)
    assert all(name in repr(found) for name in there)


@pytest.mark.parametrize(
    ("asked", "gradients", "there"),
    [
        (("mean",), False, {"mean", "variance"}),  # taken together
        (("abs_mean",), False, {"abs_mean"}),
        (("max_abs",), False, set(OF_ACTIVATIONS)),  # taken with all
        (("abs_attribution",), True, {"abs_attribution"}),
        (("variance", "square_attribution"), True, {"mean", "variance", *OF_GRADIENTS}),
    ],
)
def test_statistics_that_are_asked_for(
    patched: Patched, asked: tuple[str, ...], gradients: bool, there: set[str]
) -> None:
    record(patched, "forget", gradients=gradients)
    expected = all_of(patched)
    assert set(expected) == {*OF_ACTIVATIONS, *(OF_GRADIENTS if gradients else ())}
    patched.statistics.reset()
    record(patched, "forget", gradients=gradients, statistics=asked)
    check(patched, expected, there)


@pytest.mark.parametrize("criterion", CLOSED_FORMS)
def test_a_score_takes_what_it_is_made_of(patched: Patched, criterion: str) -> None:
    gradients = CLOSED_FORMS[criterion].gradients
    for group in ("forget", "retain"):
        record(patched, group, gradients=gradients)
    expected = all_of(patched)
    scores = clue_fast.score(patched.statistics, criterion)
    patched.statistics.reset()
    for group in ("forget", "retain"):
        record(patched, group, gradients=gradients, score=criterion)
    there = {"mean", "variance"} if "mean" in CRITERIA[criterion].reads else {"abs_mean"}
    check(patched, expected, there | ({"abs_attribution"} if gradients else set()))
    live = patched.scores()
    assert all(torch.equal(live[site], scores[site]) for site in patched.sites)
    assert patched.statistics.live.fresh


def test_a_recording_without_a_criterion_takes_all_again(patched: Patched) -> None:
    record(patched, "forget", statistics=("mean",))
    record(patched, "retain")
    assert set(all_of(patched, "retain")) == set(OF_ACTIVATIONS)
    record(patched, "forget")  # does not bring back what the first pass left out
    with pytest.raises(PatchError, match="left out max_abs"):
        _ = patched.statistics.of(patched.sites[0], "forget").max_abs
    patched.statistics.reset()
    record(patched, "forget")
    assert set(all_of(patched)) == set(OF_ACTIVATIONS)


def test_groups_by_token_lack_what_was_left_out_as_soon_as_they_count(patched: Patched) -> None:
    record(patched, "retain")
    group = torch.ones(IDS.shape, dtype=torch.int8)
    with patched.record("forget", statistics=("mean",)) as statistics:
        patched.model(IDS, token_group=group)
        assert statistics.left_out("retain") == set() and "max_abs" in statistics.left_out("forget")
        patched.model(IDS, token_group=group * 2)
        assert "max_abs" in statistics.left_out("retain")


def test_criteria_and_scores_of_what_was_left_out(patched: Patched) -> None:
    for group in ("forget", "retain"):
        record(patched, group, statistics=("abs_mean",))
    clue_fast.score(patched.statistics, "ratio")
    for read in (
        lambda: clue_fast.score(patched.statistics, "difference"),
        lambda: patched.scores("welch"),
        lambda: record(patched, "forget", score="difference"),
    ):
        with pytest.raises(PatchError, match="of group 'forget', a recording left out mean, variance"):
            read()
    assert not patched._recorder.recording


def test_what_is_incomplete_is_merged_and_saved(patched: Patched, tmp_path: Path) -> None:
    other = record(patched, "forget", statistics=("abs_mean",)).merge(patched.statistics.empty())
    patched.statistics.reset()
    everything = record(patched, "forget")
    record(patched, "retain")
    assert everything.left_out("forget") == set()
    merged = everything.merge(other)
    path = tmp_path / "statistics.safetensors"
    merged.save(path)
    swapped = merged.regroup(torch.tensor([[False, True], [True, True]]))
    for statistics, group in ((merged, "forget"), (Statistics.load(path), "forget"), (swapped, "retain")):
        assert statistics.left_out(group) == set(OF_ACTIVATIONS) - {"abs_mean"}
    for statistics, group in ((merged, "retain"), (Statistics.load(path), "retain"), (swapped, "forget")):
        assert statistics.left_out(group) == set()


def test_criteria_read_what_they_say() -> None:
    for name, form in CLOSED_FORMS.items():
        assert fields_of(CRITERIA[name].reads) == set(form.fields)


def test_bad_input(patched: Patched) -> None:
    with pytest.raises(UnknownNameError, match="unknown statistic 'median'"):
        record(patched, "forget", statistics=("median",))
    with pytest.raises(PatchError, match="add gradients=True"):
        record(patched, "forget", statistics=("attribution",))
    assert not patched._recorder.recording and not patched.statistics.left_out("forget")
