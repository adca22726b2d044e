"""The registry of objectives: one from outside, in ten lines, trains by its name wherever those of the package do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import Tensor

import clue_fast
from clue_fast import cli
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import SettingError, UnknownNameError
from clue_fast.objectives import OBJECTIVES, UNDIAL, Objective, default_objective, get_objective, register_objective
from clue_fast.objectives.base import Current, Original
from clue_fast.trainer.stages import CLUE, scheduled_objective


@pytest.fixture
def margin() -> Iterator[type[Objective]]:
    """An objective that lowers the likelihood of the forget records to a margin."""

    @register_objective
    @dataclass(frozen=True)
    class Margin(Objective):
        """Mean over the answer tokens of max(0, least - loss). Source: this test."""

        name: ClassVar[str] = "margin"
        least: float = 5.0

        def forget_term(self, current: Current, original: Original) -> Tensor:
            forget = current["forget"]
            return forget.mean((self.least - forget.losses).clamp(min=0.0))

    yield Margin
    del OBJECTIVES["margin"]


def test_it_trains_by_its_name(margin, make_model, make_selection, make_arguments, make_examples) -> None:
    model = make_model()
    trainer = clue_fast.UnlearnTrainer(
        model,
        make_arguments(max_steps=2),
        forget_dataset=make_examples(6, seed=1),
        retain_dataset=make_examples(9, seed=2),
        selection=make_selection(model),
        objective="margin",
    )
    trainer.train()
    assert trainer.objective == margin(least=5.0)
    assert all(0.0 < entry["forget_loss"] < 5.0 for entry in trainer.state.log_history if "loss" in entry)


def test_unlearn_takes_it(margin, make_model, tmp_path) -> None:
    people = make_people(4, seed=1)
    forget, retain = records_of(people[:1]), records_of(people[1:])
    tokenizer = train_tokenizer(forget + retain, vocab_size=400)
    model = make_model(layers=1, vocab_size=len(tokenizer), max_position_embeddings=256)
    sets = {"forget": forget, "retain": retain, "output_dir": tmp_path / "out"}
    result = clue_fast.unlearn(model, tokenizer, **sets, objective="margin", epochs=1, max_length=64, progress=False)
    assert result.results["settings"]["objective"] == "margin"


def test_the_command_lists_it(margin, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["unlearn", "--help"])
    assert ", ".join(OBJECTIVES) in " ".join(capsys.readouterr().out.split())


def test_a_name_is_taken_once(margin) -> None:
    register_objective(margin)  # the same again
    with pytest.raises(SettingError, match="there is an objective 'npo' already, NPO; choose another name"):
        register_objective(type("Mine", (margin,), {"name": "npo"}))
    with pytest.raises(UnknownNameError, match="unknown objective 'none'; choose one of: dpo"):
        get_objective("none")
    assert default_objective().name == "undial"


def test_the_default_objective_by_its_name() -> None:
    """As without one, also where a published schedule has a retain weight of its own; its class has the paper's."""
    assert get_objective("undial") == default_objective() == UNDIAL(strength=20.0, retain_weight=10.0)
    assert get_objective("undial", strength=3.0) == UNDIAL(strength=3.0, retain_weight=10.0)
    for schedule, retain_weight in ((None, 10.0), (CLUE, 1.0)):
        named, default = (scheduled_objective(objective, schedule) for objective in ("undial", None))
        assert named == default == UNDIAL(strength=20.0, retain_weight=retain_weight)


def test_members_by_their_old_names(margin) -> None:
    expected = r"Mine\.(remember is to be called reference_outputs|reference is to be called original_batches) now"
    with pytest.warns(FutureWarning, match=expected) as caught:
        mine = type("Mine", (margin,), {"remember": lambda self, predictions: predictions.losses, "reference": ("a",)})
    assert mine.reference_outputs is mine.remember and mine.original_batches == ("a",) and len(caught) == 2
