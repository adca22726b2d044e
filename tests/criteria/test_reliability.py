"""What a selection says of itself: do halves of the data agree on it, and do the labels matter?"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast.criteria import measure
from clue_fast.criteria.blocks import SPLITS, Block, BlockStatistics, deal, reliability
from clue_fast.criteria.measure import load_task, measure_blocks
from clue_fast.criteria.registry import get_criterion
from clue_fast.data import Record
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import SettingError
from clue_fast.reliability import Reliability, chance_overlap
from clue_fast.selection import Selection, select
from clue_fast.sites import find_sites, model_fingerprint, survey
from clue_fast.statistics import Statistics

WORDS = [first + last for first in "bdfgklmnprst" for last in ("a", "e", "i", "o", "u", "ay", "en", "or")]
COMMON, FORGOTTEN, KEPT = WORDS[:40], WORDS[40:52], WORDS[52:]


def records(seed: int, number: int, own: list[str]) -> list[Record]:
    """Questions of common words, with answers of a set's own words."""
    draw = random.Random(seed)
    return [
        Record(" ".join(draw.choices(COMMON, k=4)) + " ", " ".join(draw.choices(own, k=draw.randint(3, 6))))
        for _ in range(number)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([*records(0, 100, WORDS), *records(1, 100, WORDS)], vocab_size=300)


@pytest.fixture(scope="module")
def model(make_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_llama(tokenizer, width=32, units=96)


def localized(model, tokenizer, forget: list[Record], retain: list[Record], **options: object) -> Selection:
    """At a tenth of the units of each layer, unless another budget is given."""
    budget = {} if {"count", "threshold"} & options.keys() else {"fraction": 0.1}
    return clue_fast.localize(model, forget, retain, tokenizer=tokenizer, progress=False, **budget | options)


def mean_score(selection: Selection) -> float:
    """Over the units to train, by loops."""
    scores = [selection.scores[site][unit].item() for site in selection.sites for unit in selection.units(site)]
    return math.fsum(scores) / len(scores)


def jaccard(one: Selection, other: Selection) -> float:
    """Shared units over all units of two selections, by sets."""
    a, b = ({(site.name, int(unit)) for site in own.sites for unit in own.units(site)} for own in (one, other))
    return len(a & b) / len(a | b)


def test_where_the_labels_matter_no_other_labels_do_as_well_and_halves_agree(model, tokenizer) -> None:
    forget, retain = records(2, 60, FORGOTTEN[:4]), records(3, 60, KEPT)
    found = localized(model, tokenizer, forget, retain).reliability
    assert found.rank == 1 and len(found.permuted) == 30
    assert found.chance == pytest.approx(0.1 / 1.9, rel=0.1)
    assert found.overlap > 6 * found.chance
    assert "much more often than chance" in found.sentence
    assert found.sentence.endswith("labels exchanged at random never do as well (rank 1 of 31)")


@pytest.mark.slow
def test_where_the_labels_say_nothing_every_rank_is_as_likely(model, tokenizer) -> None:
    found = [
        localized(model, tokenizer, records(2 * seed, 12, KEPT), records(2 * seed + 1, 20, KEPT), seed=seed).reliability
        for seed in range(1, 61)
    ]
    ranks = torch.tensor([one.rank for one in found], dtype=torch.float64)
    # Largest distance of the distribution of the ranks from the uniform one; beyond 1.63 / sqrt(n) once in a hundred.
    steps = torch.arange(1, 32, dtype=torch.float64)
    distance = (torch.stack([(ranks <= step).double().mean() for step in steps]) - steps / 31).abs().max()
    assert distance < 1.63 / math.sqrt(len(ranks))


@pytest.mark.parametrize(
    ("criterion", "options"),
    [
        ("difference", {}),
        ("ratio", {"categories": True}),
        ("signed_difference", {"threshold": 0.3}),
        ("attribution", {"scope": "global", "count": 20}),
        ("fisher", {"normalize": "rank"}),
        ("wanda", {}),
        pytest.param("integrated_gradients", {}, marks=pytest.mark.slow),
    ],
)
def test_it_is_what_a_loop_finds_that_measures_anew_under_each_labelling(
    model, tokenizer, criterion: str, options: dict
) -> None:
    forget, retain = records(4, 11, FORGOTTEN + KEPT), records(5, 25, FORGOTTEN + KEPT)
    selection = localized(model, tokenizer, forget, retain, criterion=criterion, permutations=4, seed=3, **options)
    if "threshold" in options:  # under other labels as many units
        options = {"scope": "global", "count": len(selection)}
    blocks = deal(forget, retain, seed=3)
    anew = BlockStatistics(Statistics(selection.sites, ""), blocks)
    sets = {"forget": forget, "retain": retain}
    holding = [[sets[block.group][place] for place in block.records] for block in blocks]

    def from_scratch(labels: torch.Tensor) -> Selection:
        data = [[record for held, ours in zip(holding, own, strict=True) if ours for record in held] for own in labels]
        return localized(model, tokenizer, *data, criterion=criterion, permutations=0, **options)

    found = selection.reliability
    permuted = [from_scratch(labels) for labels in anew.permuted(4, seed=3)]
    assert found.score == pytest.approx(mean_score(selection), rel=1e-6)
    assert found.permuted == pytest.approx([mean_score(other) for other in permuted], rel=1e-4)
    assert found.rank == 1 + sum(mean_score(other) >= mean_score(selection) for other in permuted)
    halves = [[from_scratch(labels) for labels in pair] for pair in anew.halves(SPLITS, seed=3)]
    assert found.overlap == pytest.approx(sum(jaccard(*pair) for pair in halves) / SPLITS, abs=1e-9)


def test_labels_are_exchanged_and_sets_keep_their_sizes(model, tokenizer) -> None:
    for forget, retain in ((1, 1), (3, 2), (11, 25), (8, 200), (50, 9), (400, 3000)):
        sets = {"forget": records(6, forget, WORDS), "retain": records(7, retain, WORDS)}
        blocks = deal(sets["forget"], sets["retain"], seed=0)
        held = Counter((block.group, place) for block in blocks for place in block.records)
        assert set(held.values()) == {1}
        assert Counter(group for group, _ in held) == {group: len(own) for group, own in sets.items()}
        assert [block.group for block in blocks[:2]] == ["forget", "retain"] and len(blocks) <= 18
        sizes = torch.tensor([len(block.records) for block in blocks])
        measured = BlockStatistics(Statistics(find_sites(model), ""), blocks)
        permuted = measured.permuted(30, seed=0)
        assert bool((permuted.sum(1) == 1).all())
        assert bool(((permuted * sizes).sum(2) == torch.tensor([forget, retain])).all())
        if min(forget, retain) > 7:
            assert len({tuple(labels.flatten().tolist()) for labels in permuted}) > 25
        for pair in measured.halves(3, seed=0):
            assert bool((pair.sum(0) == measured.truth).all())
        assert len(measured.halves(3, seed=0)) == (0 if min(forget, retain) == 1 else 3)


@pytest.mark.parametrize(
    "criterion",
    ["difference", "attribution", "fisher", "wanda", pytest.param("integrated_gradients", marks=pytest.mark.slow)],
)
def test_blocks_together_are_what_is_measured_without_them(model, tokenizer, criterion: str) -> None:
    forget, retain = records(8, 21, WORDS), records(9, 50, WORDS)
    wide = LlamaForCausalLM(model.config).double()
    wide.load_state_dict(model.state_dict())
    options = {"tokenizer": tokenizer, "criterion": criterion, "progress": False}
    for own, tolerance in ((wide, 1e-12), (model, 1e-5)):
        whole = measure(own, forget, retain, **options)
        task = {**options, "criterion": get_criterion(criterion)}
        blocks = measure_blocks(load_task(own, forget, retain, found=survey(own), **task))
        merged = next(blocks.labelled(blocks.truth[None]))
        assert merged.groups == whole.groups == ["forget", "retain"]
        for name in ("count", "records", "nonfinite", "skipped"):
            assert torch.equal(getattr(merged, name), getattr(whole, name)), name
        assert torch.equal(merged.values[:, 4], whole.values[:, 4])  # active tokens; the rest is rounded by batch
        torch.testing.assert_close(merged.values, whole.values, rtol=tolerance, atol=tolerance)
        assert merged.record_sums.keys() == whole.record_sums.keys()
        for name, sums in whole.record_sums.items():
            torch.testing.assert_close(merged.record_sums[name], sums, rtol=tolerance, atol=tolerance)
        if whole.gradient_values is not None:
            torch.testing.assert_close(merged.gradient_values, whole.gradient_values, rtol=tolerance, atol=tolerance)


def test_asking_for_it_changes_no_unit_and_nothing_but_labels_changes_it(model, tokenizer) -> None:
    forget, retain = records(10, 20, FORGOTTEN + KEPT), records(11, 50, KEPT)
    first = localized(model, tokenizer, forget, retain)
    assert localized(model, tokenizer, forget, retain, permutations=0).hash == first.hash
    assert localized(model, tokenizer, forget, retain).source == first.source
    for other in (
        localized(model, tokenizer, forget[::-1], retain[::-1]),
        localized(model, tokenizer, forget, retain, tokens_per_batch=64),
    ):
        assert other.hash == first.hash
        assert other.reliability.rank == first.reliability.rank
        assert other.reliability.permuted == pytest.approx(first.reliability.permuted, rel=1e-4)
        assert other.reliability.overlap == pytest.approx(first.reliability.overlap, abs=0.02)
    assert localized(model, tokenizer, forget, retain, seed=1).reliability.permuted != first.reliability.permuted


def test_a_selection_is_saved_with_it_and_says_it(model, tokenizer, tmp_path: Path) -> None:
    selection = localized(model, tokenizer, records(12, 6, WORDS), records(13, 9, WORDS))
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors", model)
    assert loaded.reliability == selection.reliability
    assert loaded.summary().splitlines()[-1] == selection.reliability.sentence
    # What is made of it is another selection, of which the data say something else.
    assert loaded.restrict("conflict").reliability is None and loaded.limit(0.05).reliability is None


def test_statistics_of_a_selection_have_the_two_groups(model, tokenizer, tmp_path: Path) -> None:
    selection = localized(model, tokenizer, records(12, 6, WORDS), records(13, 9, WORDS))
    selection.statistics.save(tmp_path / "statistics.safetensors")
    loaded = Statistics.load(tmp_path / "statistics.safetensors")
    assert loaded.groups == ["forget", "retain"]
    assert clue_fast.select(clue_fast.score(loaded, "attribution"), 0.1).hash == selection.hash


def test_none_is_measured_where_none_is_asked_for_or_nothing_is_measured(model, tokenizer) -> None:
    forget, retain = records(12, 6, WORDS), records(13, 9, WORDS)
    off = localized(model, tokenizer, forget, retain, permutations=0)
    assert off.reliability is None and "reliability" not in off.source
    chance = localized(model, tokenizer, forget, retain, criterion="random")
    assert "was not measured: random units do not come from sums" in chance.summary()
    with pytest.raises(SettingError, match="permutations -1 is not a whole number"):
        localized(model, tokenizer, forget, retain, permutations=-1)


def test_one_record_has_labels_but_no_halves(model, tokenizer) -> None:
    found = localized(model, tokenizer, records(12, 1, FORGOTTEN), records(13, 40, KEPT)).reliability
    assert found.overlap is None and found.rank is not None
    assert found.sentence.startswith("labels exchanged at random")


def test_an_expert_that_few_records_reach_is_named_as_the_reason(model) -> None:
    blocks = [Block(group, (number,)) for number in range(4) for group in ("forget", "retain")]
    sites = find_sites(model)
    statistics = Statistics(sites, model_fingerprint(model), [f"{block.group} {block.records}" for block in blocks])
    statistics.count += 5
    statistics.count[2:, 1] = 0  # the second site saw tokens of one record of each set
    statistics.values += torch.rand(statistics.values.shape, dtype=torch.float64)
    measured = BlockStatistics(statistics, blocks)

    def choose(own: Statistics) -> Selection:
        return select(clue_fast.score(own))

    whole = choose(next(measured.labelled(measured.truth[None])))
    assert reliability(measured, choose, whole, 30, 0).reason == "some units see tokens of a few records only"


@pytest.mark.parametrize(
    ("overlap", "chance", "rank", "sentence"),
    [
        (
            0.036,
            0.053,
            20,
            "two halves of the data select the same units hardly more often than chance (.04, chance .05); "
            "labels exchanged at random do as well (rank 20 of 31)",
        ),
        (
            0.14,
            0.053,
            3,
            "two halves of the data select the same units somewhat more often than chance (.14, chance .05); "
            "labels exchanged at random seldom do as well (rank 3 of 31)",
        ),
        (
            1.0,
            1.0,
            1,
            "two halves of the data select the same units hardly more often than chance (1.00, chance 1.00); "
            "labels exchanged at random never do as well (rank 1 of 31)",
        ),
    ],
)
def test_it_is_said_in_words(overlap: float, chance: float, rank: int, sentence: str) -> None:
    found = Reliability(overlap, chance, 5, 1.0, (1.0,) * (rank - 1) + (0.9,) * (31 - rank))
    assert found.sentence == sentence
    assert Reliability.from_dict(found.as_dict()) == found
    assert found.as_dict()["rank"] == rank and found.as_dict()["of"] == 31


@pytest.mark.parametrize(
    ("widths", "first", "second"),
    [((5,), (1,), (1,)), ((5, 4), (2, 1), (3, 2)), ((4,), (4,), (2,)), ((3,), (0,), (0,))],
)
def test_chance_is_the_mean_over_all_draws(
    widths: tuple[int, ...], first: tuple[int, ...], second: tuple[int, ...]
) -> None:
    def draws(taken: tuple[int, ...]) -> list[set[tuple[int, int]]]:
        layers = [
            [{(layer, unit) for unit in units} for units in combinations(range(width), number)]
            for layer, (width, number) in enumerate(zip(widths, taken, strict=True))
        ]
        return [set().union(*parts) for parts in product(*layers)]

    overlaps = [len(a & b) / len(a | b) if a | b else 1.0 for a in draws(first) for b in draws(second)]
    assert chance_overlap(widths, first, second) == pytest.approx(sum(overlaps) / len(overlaps), rel=1e-9)


def test_chance_of_a_large_model() -> None:
    sizes = (1101,) * 32
    assert chance_overlap((11008,) * 32, sizes, sizes) == pytest.approx(0.1 / 1.9, rel=1e-3)
