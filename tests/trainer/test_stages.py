"""Stages of a training: which units move when, what a published schedule brings along, and what is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from clue_fast.errors import SelectionError, SettingError, UnknownNameError
from clue_fast.objectives import NPO
from clue_fast.sparse import changed_inside, changed_outside, snapshot
from clue_fast.trainer import Stage, UnlearnTrainer
from clue_fast.trainer.stages import get_stages, stage_at


@pytest.fixture
def make_staged(make_model, make_selection, make_arguments, make_examples):
    def make(
        model: nn.Module,
        stages: Any,
        objective: Any = "npo",
        forget: int = 4,
        options: Mapping[str, Any] = MappingProxyType({}),
        **settings: Any,
    ) -> UnlearnTrainer:
        return UnlearnTrainer(
            model,
            make_arguments(per_device_train_batch_size=5, **settings),
            forget_dataset=make_examples(10, seed=1),
            retain_dataset=make_examples(10, seed=2),
            selection=make_selection(model, units=5, forget=forget),
            objective=objective,
            stages=stages,
            **options,
        )

    return make


def test_the_published_schedule(make_model, make_staged):
    """One epoch of forget units on the forget loss, five of conflict units on both."""
    model = make_model(torch.bfloat16)
    before = snapshot(model)
    trainer = make_staged(model, "clue", NPO(beta=0.5, retain_weight=2.0))
    moved: list[set[str]] = []
    masters = [p.detach().clone() for p in trainer.sparse.trainable_parameters]

    def watched(*_: Any) -> None:
        moved.append(set())
        for part, master in zip(trainer.sparse.slices, masters, strict=True):
            if not torch.equal(part.values, master):
                moved[-1].add(part.category)
            master.copy_(part.values.detach())

    trainer.create_optimizer().register_step_post_hook(watched)
    trainer.train()
    assert trainer.state.global_step == 12 and trainer.state.epoch == 6
    assert moved == [{"forget"}] * 2 + [{"conflict"}] * 10
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["stage"] for entry in logs] == [1] * 2 + [2] * 10
    assert ["retain_loss" in entry for entry in logs] == [False] * 2 + [True] * 10
    assert trainer.objective == NPO(beta=0.5, retain_weight=2.0)
    assert changed_outside(before, model, trainer.sparse.selection) == 0
    assert changed_inside(before, model, trainer.sparse.selection) > 0


class TestThePublishedSettings:
    """One rate for all layers, as many retain as forget records, a retain weight of 1; unless told otherwise."""

    def rates(self, trainer: UnlearnTrainer) -> set[float]:
        return {group["lr"] for group in trainer.create_optimizer().param_groups}

    def records(self, trainer: UnlearnTrainer) -> dict[str, int]:
        batch = next(iter(trainer.get_train_dataloader()))
        return {side: len(batch[side]["labels"]) for side in ("forget", "retain")}

    def test_come_with_the_schedule(self, make_model, make_staged):
        trainer = make_staged(make_model(), "clue", "gradient_ascent")
        assert self.rates(trainer) == {1e-3}
        assert self.records(trainer) == {"forget": 5, "retain": 5}
        assert [stage.objective.retain_weight for stage in trainer.stages] == [0.0, 1.0]
        assert [stage.epochs for stage in trainer.stages] == [1, 5] and trainer.args.num_train_epochs == 6

    def test_what_is_given_stays(self, make_model, make_staged):
        given = {"layer_lr": 0.25, "retain_ratio": 2}
        trainer = make_staged(make_model(), "clue", NPO(retain_weight=2.0), options=given)
        assert self.rates(trainer) == {1e-3, 5e-4, 2.5e-4}
        assert self.records(trainer) == {"forget": 5, "retain": 10}
        assert [stage.objective.retain_weight for stage in trainer.stages] == [0.0, 2.0]

    def test_other_trainings_have_the_defaults_of_the_package(self, make_model, make_staged):
        for stages in (None, [Stage(("conflict",), "npo", 2)]):
            trainer = make_staged(make_model(), stages, "gradient_ascent")
            assert min(self.rates(trainer)) == pytest.approx(0.2 * max(self.rates(trainer)))
            assert self.records(trainer) == {"forget": 5, "retain": 20}
            assert trainer.objective.retain_weight == 0.0
            trainer.sparse.restore()


def test_a_stage_without_units_is_skipped_and_named(make_model, make_staged, caplog):
    trainer = make_staged(make_model(), "clue", forget=0)
    assert [stage.units for stage in trainer.stages] == [("conflict",)] and trainer.args.num_train_epochs == 5
    named = [record.getMessage() for record in caplog.records if record.name == "clue_fast.trainer.stages"]
    assert named == ["the stage of forget units is skipped: the selection has none"]
    trainer.train()
    assert trainer.state.global_step == 10
    assert not any(torch.equal(part.master(), part.original) for part in trainer.sparse.slices)


@pytest.mark.parametrize("step", [1, 3])
def test_resume_in_any_stage_gives_the_same_bits(step, make_model, make_staged):
    stages = [Stage(("forget",), "gradient_ascent", 1), Stage(("forget", "conflict"), NPO(), 1)]
    models = [make_model() for _ in range(2)]
    straight = make_staged(models[0], stages, save_strategy="steps", save_steps=1)
    straight.train()
    resumed = make_staged(models[1], stages)
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-{step}")
    assert straight.state.global_step == resumed.state.global_step == 4
    first, second = (snapshot(model) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_stages_by_epoch(make_model, make_selection):
    stages = [Stage(("forget",), "simnpo", 2), Stage(("conflict",), "npo", 3)]
    assert [stage_at(stages, epoch) for epoch in range(7)] == [0, 0, 1, 1, 1, 1, 1]
    model = make_model()
    both, conflict = make_selection(model, forget=2), make_selection(model)
    assert get_stages(stages, NPO(), both) == tuple(stages)
    assert get_stages(stages, NPO(), conflict) == tuple(stages[1:])
    with pytest.raises(SelectionError, match="no stage has anything to train: the selection has no forget units"):
        get_stages(stages[:1], NPO(), conflict)
    with pytest.raises(UnknownNameError, match="unknown schedule of stages 'two'; choose one of: clue"):
        get_stages("two", NPO(), both)
    with pytest.raises(SettingError, match="without stages"):
        get_stages([], NPO(), both)
    with pytest.raises(UnknownNameError, match="category of units 'retain'"):
        Stage(("retain",), "npo", 1)
    with pytest.raises(SettingError, match="at least one"):
        Stage(("forget",), "npo", 0)
