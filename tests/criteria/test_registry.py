"""A criterion that is defined outside of the package is one like all others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast import cli
from clue_fast.config import CircuitConfig
from clue_fast.criteria import CRITERIA, MEASUREMENTS, Criterion, Measured, criterion, score
from clue_fast.data import Record
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import PatchError, SelectionError, SettingError
from clue_fast.sites import find, mlp

from .test_docs import table

FORGET = [Record("the sign of april is ", "aries"), Record("the sign of may is ", "taurus")]
RETAIN = [Record("the color of snow is ", "white"), Record("the color of coal is ", "black")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN, vocab_size=300)


@pytest.fixture
def peak() -> Iterator[Criterion]:
    @criterion(needs="activations", importance=lambda units: units.max_abs)
    def peak(measured: Measured) -> Tensor:
        """max_forget|a| - max_retain|a|

        Source: this test.
        """
        return measured.forget.max_abs - measured.retain.max_abs

    yield CRITERIA["peak"]
    del CRITERIA["peak"]


def test_it_is_in_the_registry_the_help_and_the_documentation(
    peak: Criterion, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (peak.formula, peak.source) == ("max_forget|a| - max_retain|a|", "this test.")
    assert r"| `peak` | max_forget\|a\| - max_retain\|a\| | 1 + 0 | this test. |" in table()
    for command in ("localize", "unlearn"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        assert "peak" in capsys.readouterr().out


@pytest.mark.parametrize("categories", [False, True])
def test_localize_selects_by_it(
    make_llama, tokenizer: PreTrainedTokenizerFast, peak: Criterion, categories: bool
) -> None:
    model: LlamaForCausalLM = make_llama(tokenizer, 16, 40)
    selection = clue_fast.localize(
        model,
        FORGET,
        RETAIN,
        tokenizer=tokenizer,
        criterion="peak",
        categories=categories,
        permutations=3,
        progress=False,
    )
    assert selection.source["criterion"] == "peak" and selection.reliability.reason is None
    site = selection.sites[0]
    forget, retain = (selection.statistics.of(site, group).max_abs for group in ("forget", "retain"))
    expected = forget if categories else forget - retain
    torch.testing.assert_close(selection.scores[site].double(), expected, rtol=1e-6, atol=1e-7)


@dataclass(frozen=True)
class Longest(Criterion):
    """Ranks by the length of the records' answers, whatever the model does."""

    many_retain_sets: bool = True

    def find(self, task) -> int:
        return max(len(record.completion) for records in task.retain.values() for record in records)


def test_one_that_looks_at_the_records_itself(make_llama, tokenizer: PreTrainedTokenizerFast) -> None:
    @criterion(needs="nothing", kind=Longest)
    def longest(measured: Measured) -> Tensor:
        """Number of letters of the longest retained answer.

        Source: this test.
        """
        return torch.full((int(measured.statistics.offsets[-1]),), float(measured.found))

    try:
        model = make_llama(tokenizer, 16, 40)
        retain = {"snow": RETAIN[:1], "more": [Record("the color of grass is ", "greenish")]}
        selection = clue_fast.localize(
            model, FORGET, retain, tokenizer=tokenizer, criterion="longest", progress=False, fraction=0.1
        )
        assert all(bool((scores == 8.0).all()) for scores in selection.scores.values())
        assert "longest units do not come from sums over records" in selection.summary()
    finally:
        del CRITERIA["longest"]


@pytest.mark.parametrize("name", ["difference", "fisher", "random", "circuit"])
def test_localize_searches_the_sites_once(
    make_llama, tokenizer: PreTrainedTokenizerFast, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = []

    def find_mlp(module: nn.Module, path: str) -> object:
        searched.append(path)
        return mlp.find_mlp(module, path)

    monkeypatch.setattr(find, "find_mlp", find_mlp)
    model = make_llama(tokenizer, 16, 40)
    options = {"corruption": "answer"} if name == "circuit" else None
    clue_fast.localize(
        model,
        FORGET,
        RETAIN,
        tokenizer=tokenizer,
        criterion=name,
        count=4,
        circuit=options and CircuitConfig(**options),
        progress=False,
    )
    assert len(searched) == len(set(searched)) > 0


def test_every_criterion_needs_something_that_can_be_measured() -> None:
    assert {each.needs for each in CRITERIA.values()} == set(MEASUREMENTS)


def test_circuits_are_not_in_statistics(make_llama, tokenizer: PreTrainedTokenizerFast) -> None:
    with clue_fast.patch(make_llama(tokenizer, 16, 40)) as patched, pytest.raises(PatchError, match="no forget token"):
        score(patched.statistics, "circuit")


class TestBadInput:
    def test_several_retain_sets(self, make_llama, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(SelectionError, match="several retain sets need the criterion 'circuit'; 'wanda' compares"):
            clue_fast.localize(
                make_llama(tokenizer, 16, 40), FORGET, {"a": RETAIN}, tokenizer=tokenizer, criterion="wanda"
            )

    def test_settings_of_nothing(self, make_llama, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(SettingError, match="'attribution' has no use for them"):
            clue_fast.localize(make_llama(tokenizer, 16, 40), FORGET, RETAIN, tokenizer=tokenizer, circuit=object())
