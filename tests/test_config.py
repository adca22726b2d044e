"""Configurations: every default once, and a value out of range is refused with the name of its field."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from clue_fast.config import (
    CircuitConfig,
    EvalConfig,
    LocalizeConfig,
    ModelConfig,
    UnlearnConfig,
    default_epochs,
    default_learning_rate,
)
from clue_fast.config.schema import choices_of
from clue_fast.errors import BudgetError, ClueFastError, SettingError, UnknownNameError

CONFIGS = (CircuitConfig, EvalConfig, LocalizeConfig, ModelConfig, UnlearnConfig)


@pytest.mark.parametrize(
    ("kind", "name", "value", "error"),
    [
        (LocalizeConfig, "fraction", 0.0, BudgetError),
        (LocalizeConfig, "fraction", {"mlp": "much"}, BudgetError),
        (LocalizeConfig, "count", 2.5, BudgetError),
        (LocalizeConfig, "scope", "galaxy", BudgetError),
        (LocalizeConfig, "max_length", 0, SettingError),
        (LocalizeConfig, "seed", 0.5, SettingError),
        (LocalizeConfig, "strict", "yes", SettingError),
        (LocalizeConfig, "tokens_per_batch", float("nan"), SettingError),
        (CircuitConfig, "edges", -1, BudgetError),
        (CircuitConfig, "steps", 0.5, BudgetError),
        (CircuitConfig, "time_limit", float("nan"), BudgetError),
        (CircuitConfig, "logic", "fuzzy", UnknownNameError),
        (ModelConfig, "dtype", "int8", UnknownNameError),
        (UnlearnConfig, "learning_rate", float("inf"), SettingError),
        (UnlearnConfig, "learning_rate", "fast", SettingError),
        (UnlearnConfig, "layer_lr", 0, SettingError),
        (UnlearnConfig, "layer_lr", "linear:-1", SettingError),
        (UnlearnConfig, "epochs", 0, SettingError),
        (UnlearnConfig, "batch_size", True, SettingError),
        (UnlearnConfig, "retain_ratio", 0, SettingError),
        (UnlearnConfig, "layers", (0.5,), SettingError),
        (UnlearnConfig, "layers", (0.5, 1.5), SettingError),
        (UnlearnConfig, "lower_layers_gb", -1.0, SettingError),
        (UnlearnConfig, "forget_target", 1.5, SettingError),
        (UnlearnConfig, "evaluate_every", -1, SettingError),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(kind: Any, name: str, value: Any, error: type[ClueFastError]) -> None:
    with pytest.raises(error, match=rf"\b{name}\b"):
        kind(**{name: value})


def test_what_excludes_each_other_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match="master_weights and stochastic_rounding exclude each other"):
        UnlearnConfig(stochastic_rounding=True)
    with pytest.raises(SettingError, match="stages have epochs of their own"):
        UnlearnConfig(stages="clue", epochs=1)
    with pytest.raises(BudgetError, match="give one budget, not fraction and count"):
        LocalizeConfig(fraction=0.1, count=3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_field_is_described_and_defaults_are_among_the_choices(kind: Any) -> None:
    told = " ".join(inspect.getdoc(each) or "" for each in kind.__mro__)
    for one in fields(kind):
        assert one.name in told, one.name
        assert one.metadata["help"] or one.name in ("circuit", "progress")
        choices = choices_of(one)
        assert not choices or one.default is None or one.default in choices


def test_of_more_values_than_there_are_fields() -> None:
    config = UnlearnConfig(samples=3, seed=7, fraction=0.2)
    assert UnlearnConfig.of({**vars(config), "forget": "more", "model": None}) == config
    assert config.measures["samples"] == {"forget": 3}


def test_epochs_are_ten_or_two_hundred_steps() -> None:
    assert [default_epochs(records, 8) for records in (8, 80, 1600)] == [200.0, 20.0, 10.0]


def test_the_learning_rate_falls_with_the_width_and_with_the_root_of_the_share_of_units() -> None:
    narrow, wide = (_llama(width) for width in (16, 64))
    assert default_learning_rate(narrow) == pytest.approx(0.4 / 16 / 0.1)
    assert default_learning_rate(wide) == pytest.approx(default_learning_rate(narrow) / 4)
    assert default_learning_rate(narrow, 0.09) == pytest.approx(default_learning_rate(narrow, 0.01) / 3)


def _llama(width: int) -> LlamaForCausalLM:
    sizes = {"vocab_size": 4, "hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=1, **sizes))
