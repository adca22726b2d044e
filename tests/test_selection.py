"""Selections: budgets, categories, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from clue_fast.errors import BudgetError, FileFormatError, NonFiniteError, OutputError, SelectionError, UnknownNameError
from clue_fast.selection import CONFLICT, FORGET, IRRELEVANT, RETAIN, Scores, Selection, categorize, select
from clue_fast.sites import ParamSlice, Site
from clue_fast.sparse.slices import plan


def make_site(layer: int, width: int, kind: str = "mlp") -> Site:
    return Site(f"model.layers.{layer}.{kind}", kind, width, layer)


def make_scores(*rows: list[float]) -> Scores:
    values = {make_site(layer, len(row)): torch.tensor(row) for layer, row in enumerate(rows)}
    return Scores(values, "difference", "f" * 16)


SCORES = make_scores([0.1, 0.9, 0.5, 0.3], [8.0, 7.0, 6.0, 9.0])


def chosen(selection: Selection) -> list[list[int]]:
    return [selection.units(site).tolist() for site in selection.sites]


def test_the_top_of_every_layer_is_selected() -> None:
    assert chosen(select(SCORES, 0.5)) == [[1, 2], [0, 3]]
    assert chosen(select(SCORES, 0.01)) == [[1], [3]]
    assert chosen(select(SCORES, count=3)) == [[1, 2, 3], [0, 1, 3]]


def test_a_global_budget_ranks_all_units_together() -> None:
    assert chosen(select(SCORES, 0.5, scope="global")) == [[], [0, 1, 2, 3]]
    assert chosen(select(SCORES, count=5, scope="global")) == [[1], [0, 1, 2, 3]]


def test_a_threshold_is_inclusive() -> None:
    assert chosen(select(SCORES, threshold=0.5)) == [[1, 2], [0, 1, 2, 3]]


def test_ties_go_to_the_lower_unit() -> None:
    assert chosen(select(make_scores([1.0] * 6), 0.5)) == [[0, 1, 2]]


@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), min_size=1, max_size=4),
    fraction=st.floats(0.001, 1.0),
    scope=st.sampled_from(["layer", "global"]),
)
def test_no_unit_left_out_beats_one_selected(rows: list[list[float]], fraction: float, scope: str) -> None:
    scores = make_scores(*rows)
    selection = select(scores, fraction, scope=scope)
    pools = [list(scores)] if scope == "global" else [[site] for site in scores]
    for pool in pools:
        values = torch.cat([scores[site] for site in pool])
        mask = torch.cat([selection.categories[site] == CONFLICT for site in pool])
        assert int(mask.sum()) == max(1, round(fraction * len(values)))
        if not bool(mask.all()):
            assert values[mask].min() >= values[~mask].max()


def test_units_to_train_are_forget_and_conflict() -> None:
    site = make_site(0, 4)
    categories = {site: torch.tensor([IRRELEVANT, FORGET, RETAIN, CONFLICT])}
    selection = Selection([site], categories, {site: torch.zeros(4)}, {}, "f")
    assert selection.units(site).tolist() == [1, 3]
    assert selection.fraction == 0.5


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    selection = select(SCORES, 0.5)
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert loaded.hash == selection.hash
    assert loaded.source == selection.source
    assert loaded.sites == selection.sites
    assert all(torch.equal(loaded.scores[site], selection.scores[site]) for site in loaded.sites)
    assert [path.name for path in tmp_path.iterdir()] == ["selection.safetensors"]


def test_the_hash_depends_on_the_categories() -> None:
    assert select(SCORES, 0.5).hash == select(SCORES, 0.49).hash
    assert select(SCORES, 0.5).hash != select(SCORES, 0.25).hash


def test_a_budget_by_kind_ranks_each_kind_on_its_own() -> None:
    sites = [make_site(0, 4), make_site(0, 2, "head"), make_site(1, 4), make_site(1, 2, "head")]
    rows = [[4.0, 3.0, 2.0, 1.0], [90.0, 80.0], [8.0, 7.0, 6.0, 5.0], [70.0, 60.0]]
    scores = Scores(dict(zip(sites, map(torch.tensor, rows), strict=True)), "difference", "f" * 16)
    assert chosen(select(scores, 0.5, scope="kind")) == [[], [0, 1], [0, 1, 2, 3], []]
    assert chosen(select(scores, {"mlp": 0.25, "head": 0.75}, scope="kind")) == [[], [0, 1], [0, 1], [0]]
    assert chosen(select(scores, count={"head": 1})) == [[], [0], [], [0]]


def test_scores_of_layers_of_another_scale_are_made_comparable() -> None:
    scores = make_scores([1.0, 2.0, 3.0, 10.0], [700.0, 800.0, 900.0, 1000.0])
    assert chosen(select(scores, count=2, scope="global")) == [[], [2, 3]]
    assert chosen(select(scores, count=2, scope="global", normalize="rank")) == [[3], [3]]
    assert chosen(select(scores, count=1, scope="global", normalize="standardize")) == [[3], []]
    assert chosen(select(scores, threshold=0.75, normalize="rank")) == [[2, 3], [2, 3]]


@given(rows=st.lists(st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=20), min_size=1, max_size=3))
def test_normalization_keeps_the_order_within_a_site(rows: list[list[float]]) -> None:
    scores = make_scores(*rows)
    plain = select(scores, 0.3)
    assert select(scores, 0.3, normalize="rank").hash == plain.hash


def test_four_categories_from_two_importances() -> None:
    forget = make_scores([0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.8, 0.9])
    retain = make_scores([0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.9, 0.8])
    selection = categorize(forget, retain, 0.5)
    first, second = (selection.categories[site].tolist() for site in selection.sites)
    assert first == [CONFLICT, FORGET, RETAIN, IRRELEVANT]
    assert second == [IRRELEVANT, IRRELEVANT, CONFLICT, CONFLICT]
    assert chosen(selection.restrict("forget")) == [[1], []]
    assert chosen(selection.restrict("conflict")) == [[0], [2, 3]]
    kept = selection.restrict("retain")
    assert len(kept) == 0
    assert kept.categories[kept.sites[0]].tolist() == [IRRELEVANT, IRRELEVANT, RETAIN, IRRELEVANT]


def test_a_budget_beyond_a_category_is_reported_and_not_filled(caplog: pytest.LogCaptureFixture) -> None:
    forget = make_scores([0.9, 0.8, 0.1, 0.2], [0.1, 0.2, 0.8, 0.9])
    retain = make_scores([0.9, 0.1, 0.8, 0.2], [0.1, 0.2, 0.9, 0.8])
    selection = categorize(forget, retain, 0.5)
    assert chosen(selection.limit(0.25)) == [[0], [3]]
    assert selection.limit(0.25).shortfall == 0
    limited = selection.restrict("forget").limit(0.5)
    assert chosen(limited) == [[1], []]
    assert limited.shortfall == 3
    assert "3 units more than are forget or conflict" in caplog.text
    assert "3 units fewer than the budget" in limited.summary()
    assert chosen(selection.limit(count=3, scope="global")) == [[0, 1], [3]]


def test_limits_keep_retain_units_as_they_are() -> None:
    forget, retain = make_scores([0.9, 0.8, 0.1, 0.2]), make_scores([0.1, 0.2, 0.9, 0.8])
    limited = categorize(forget, retain, 0.5).limit(0.25)
    assert limited.categories[limited.sites[0]].tolist() == [FORGET, IRRELEVANT, RETAIN, RETAIN]


@given(
    left=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    right=st.lists(st.integers(0, 3), min_size=1, max_size=12),
)
def test_set_operations_are_those_of_the_units_to_train(left: list[int], right: list[int]) -> None:
    width = min(len(left), len(right))
    site = make_site(0, width)

    def made(categories: list[int]) -> Selection:
        return Selection([site], {site: torch.tensor(categories[:width])}, {site: torch.zeros(width)}, {}, "f")

    a, b = made(left), made(right)
    first, second = (set(each.units(site).tolist()) for each in (a, b))
    assert set((a | b).units(site).tolist()) == first | second
    assert set((a & b).units(site).tolist()) == first & second
    assert set((a - b).units(site).tolist()) == first - second
    assert a.overlap(b) == (len(first & second) / len(first | second) if first | second else 1.0)
    retained = {unit for unit in range(width) if left[unit] & RETAIN and right[unit] & RETAIN}
    assert {u for u in range(width) if int((a & b).categories[site][u]) & RETAIN} == retained


def test_the_summary_counts_every_category() -> None:
    forget, retain = make_scores([0.9, 0.8, 0.1, 0.2]), make_scores([0.9, 0.1, 0.8, 0.2])
    row = categorize(forget, retain, 0.5).summary().splitlines()[1].split()
    assert row == ["model.layers.0.mlp", "4", "1", "1", "1", "1"]


class TestBadInput:
    def test_a_budget_of_no_kind_there_is(self) -> None:
        with pytest.raises(BudgetError, match=r"'expert'; the model has: mlp"):
            select(SCORES, {"expert": 0.1})
        with pytest.raises(BudgetError, match="by kind"):
            select(SCORES, {"mlp": 0.1}, scope="global")

    def test_unknown_names(self) -> None:
        with pytest.raises(UnknownNameError, match="astrology"):
            select(SCORES, 0.1, normalize="astrology")
        with pytest.raises(UnknownNameError, match="lost"):
            select(SCORES, 0.1).restrict("lost")

    def test_importances_and_selections_of_two_models(self) -> None:
        other = Scores(dict(SCORES), "difference", "e" * 16)
        with pytest.raises(SelectionError, match="different models"):
            categorize(SCORES, other)
        with pytest.raises(SelectionError, match="cannot be combined"):
            _ = select(SCORES) | select(other)

    @pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
    def test_fraction(self, fraction: float) -> None:
        with pytest.raises(BudgetError, match="outside"):
            select(SCORES, fraction)

    @pytest.mark.parametrize("count", [0, -1, 2.5])
    def test_count(self, count: float) -> None:
        with pytest.raises(BudgetError, match="positive integer"):
            select(SCORES, count=count)  # type: ignore[arg-type]

    def test_count_beyond_the_units(self) -> None:
        with pytest.raises(BudgetError, match="more than the 4 units"):
            select(SCORES, count=5)

    def test_two_budgets(self) -> None:
        with pytest.raises(BudgetError, match="one budget"):
            select(SCORES, 0.1, count=3)

    def test_scope(self) -> None:
        with pytest.raises(BudgetError, match="planet"):
            select(SCORES, 0.1, scope="planet")

    def test_nan_score_names_the_site(self) -> None:
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp"):
            select(make_scores([1.0], [float("nan")]), 0.5)

    def test_truncated_file(self, tmp_path: Path) -> None:
        path = tmp_path / "selection.safetensors"
        select(SCORES, 0.5).save(path)
        whole = path.read_bytes()
        for length in (0, 7, 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(FileFormatError, match=r"selection\.safetensors"):
                Selection.load(path)

    def test_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileFormatError, match="no such file"):
            Selection.load(tmp_path / "none.safetensors")

    def test_file_of_another_program(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        with pytest.raises(FileFormatError, match="another program"):
            Selection.load(tmp_path / "model.safetensors")

    def test_file_of_another_kind(self, tmp_path: Path) -> None:
        from clue_fast.statistics import Statistics

        Statistics([make_site(0, 4)], "f").save(tmp_path / "s.safetensors")
        with pytest.raises(FileFormatError, match="holds statistics, not a selection"):
            Selection.load(tmp_path / "s.safetensors")

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="cannot write"):
            select(SCORES, 0.5).save(tmp_path / "none" / "s.safetensors")

    def test_categories_that_do_not_fit(self) -> None:
        site = make_site(0, 4)
        with pytest.raises(SelectionError, match="4 units"):
            Selection([site], {site: torch.zeros(3)}, {site: torch.zeros(4)}, {}, "f")


def test_parts_of_stacked_and_interleaved_parameters_are_kept_apart(tmp_path: Path) -> None:
    """Two experts of three units: gate and up interleaved, down transposed; and query heads in blocks of two."""
    experts = [
        Site(
            "experts",
            "expert",
            3,
            0,
            "experts",
            "experts.down",
            (
                ParamSlice("experts.gate_up", 1, 0, 2, expert_index=e),
                ParamSlice("experts.gate_up", 1, 1, 2, expert_index=e),
                ParamSlice("experts.down", 0, expert_index=e),
            ),
            index=e,
        )
        for e in range(2)
    ]
    heads = Site("attention", "attention_query", 4, 0, "heads", "o", (ParamSlice("qkv", 0, 0, 8, 8, block=2, gap=16),))
    sites = (*experts, heads)
    categories = {
        experts[0]: torch.tensor([0, CONFLICT, 0]),
        experts[1]: torch.tensor([CONFLICT, 0, CONFLICT]),
        heads: torch.tensor([0, CONFLICT, CONFLICT, 0]),
    }
    selection = Selection(sites, categories, {site: torch.zeros(site.width) for site in sites}, {}, "f")
    slices = {(s.path, s.dim, s.expert_index): s.index.tolist() for s in plan(selection)}
    assert slices == {
        ("experts.gate_up", 1, 0): [2, 3],
        ("experts.down", 0, 0): [1],
        ("experts.gate_up", 1, 1): [0, 1, 4, 5],
        ("experts.down", 0, 1): [0, 2],
        ("qkv", 0, None): [*range(8, 16), *range(32, 40)],
    }
    selection.save(tmp_path / "s.safetensors")
    assert Selection.load(tmp_path / "s.safetensors").sites == sites
    assert [site.name for site in sites] == ["experts[0]", "experts[1]", "attention:attention_query"]
