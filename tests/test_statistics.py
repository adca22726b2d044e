"""Statistics: merging, groups, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clue_fast import ops
from clue_fast.errors import FileFormatError, NonFiniteError, PatchError, SelectionError
from clue_fast.sites import Site
from clue_fast.statistics import Statistics

WIDTHS = (5, 3)
SITES = [Site(f"layers.{i}.mlp", "mlp", width, i) for i, width in enumerate(WIDTHS)]


def fill(statistics: Statistics, activations: dict[str, list[torch.Tensor]]) -> Statistics:
    """Adds [tokens, width] activations by group and site."""
    for name, tensors in activations.items():
        index = statistics.group_index(name)
        for number, (site, tensor) in enumerate(zip(statistics.sites, tensors, strict=True)):
            group = torch.full((len(tensor),), index, dtype=torch.int8)
            ops.channel_statistics(tensor, group, statistics.values[:, :, statistics.units(site)])
            statistics.count[index - 1, number] += len(tensor)
    return statistics


def draw(tokens: int) -> list[torch.Tensor]:
    return [torch.randn(tokens, width) for width in WIDTHS]


def test_merging_equals_recording_everything_at_once() -> None:
    torch.manual_seed(0)
    first, second, other = draw(40), draw(25), draw(7)
    left = fill(Statistics(SITES, "f"), {"forget": first})
    right = fill(Statistics(SITES, "f"), {"other": other, "forget": second})
    merged = left.merge(right)
    both = [torch.cat(pair).double() for pair in zip(first, second, strict=True)]
    for site, activation in zip(SITES, both, strict=True):
        found = merged.of(site, "forget")
        assert found.count == 65
        torch.testing.assert_close(found.mean, activation.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.variance, activation.var(0, correction=0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.max_abs, activation.abs().amax(0))
    assert merged.of(SITES[0], "other").count == 7
    assert int(left.count.sum()) == 80, "merging must not change its parts"


def test_repeated_merging_does_not_drift() -> None:
    """2^30 tokens with a mean that float32 sums of that length could not hold."""
    part = fill(Statistics(SITES, "f"), {"forget": [torch.full((4, width), 0.1) for width in WIDTHS]})
    for _ in range(28):
        part = part.merge(part)
    found = part.of(SITES[0], "forget")
    assert found.count == 2**30
    torch.testing.assert_close(found.mean, torch.full((5,), 0.1, dtype=torch.float64), rtol=1e-7, atol=0.0)
    assert float(found.variance.max()) < 1e-8


def test_saved_and_loaded_they_are_the_same(tmp_path: Path) -> None:
    statistics = fill(Statistics(SITES, "f"), {"forget": draw(9), "third": draw(2)})
    statistics.allocate_gradients()
    statistics.save(tmp_path / "s.safetensors")
    loaded = Statistics.load(tmp_path / "s.safetensors")
    assert torch.equal(loaded.values, statistics.values)
    assert torch.equal(loaded.count, statistics.count)
    assert (loaded.groups, loaded.sites, loaded.fingerprint) == (statistics.groups, statistics.sites, "f")
    assert loaded.gradient_values is not None


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    Statistics(SITES, "f").save(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(FileFormatError, match="truncated"):
        Statistics.load(path)


def test_statistics_of_another_model_are_not_merged() -> None:
    with pytest.raises(SelectionError, match="cannot be merged"):
        Statistics(SITES, "one").merge(Statistics(SITES, "two"))


def test_groups_that_were_never_recorded() -> None:
    statistics = fill(Statistics(SITES, "f"), {"forget": draw(3)})
    with pytest.raises(PatchError, match="'retain'"):
        statistics.of(SITES[0], "retain")
    with pytest.raises(PatchError, match="'sideways'"):
        statistics.of(SITES[0], "sideways")


def test_no_more_than_127_groups() -> None:
    statistics = Statistics(SITES, "f")
    for number in range(125):
        statistics.group_index(f"group {number}")
    with pytest.raises(PatchError, match="127"):
        statistics.group_index("one more")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_activations_are_named(bad: float) -> None:
    activations = draw(6)
    activations[1][2, 1] = bad
    statistics = fill(Statistics(SITES, "f"), {"forget": activations})
    with pytest.raises(NonFiniteError, match=r"1 of 2 sites, first layers\.1\.mlp"):
        statistics.check_finite()
