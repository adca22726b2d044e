"""The forget loss reaches forget and conflict units, the retain loss conflict units only; and stages of a training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clue_fast.errors import SelectionError, SettingError, SparseError, UnknownNameError
from clue_fast.objectives import NPO, GradientAscent, GradientDifference
from clue_fast.sparse import changed_inside, changed_outside, snapshot, sparsify
from clue_fast.sparse.slices import Pass, Reach
from clue_fast.trainer import Stage, UnlearnTrainer
from clue_fast.trainer.stages import get_stages, stage_at


def dense_gradients(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean over records of the mean loss over labels, by autograd on all weights, record by record."""
    model.zero_grad()
    for record in range(len(batch["labels"])):
        alone = {name: tensor[record : record + 1] for name, tensor in batch.items()}
        (model(**alone).loss / len(batch["labels"])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(params=[None, False, True], ids=["plain", "checkpointing", "reentrant"])
def checkpointing(request: pytest.FixtureRequest) -> Any:
    """checkpointing(model) turns gradient checkpointing on, or not."""

    def enable(model: Any) -> None:
        model.train()
        if request.param is not None:
            model.gradient_checkpointing_enable({"use_reentrant": request.param})
        if request.param:
            model.enable_input_require_grads()

    return enable


def test_each_loss_reaches_its_units(checkpointing, make_model, make_selection, make_batch):
    """In one backward of a mixed batch; against the gradients of each loss alone, to the rounding of float32."""
    model, batches = make_model(), {"forget": make_batch(3, seed=1), "retain": make_batch(4, seed=2)}
    dense = copy.deepcopy(model)
    forget, retain = (dense_gradients(dense, batches[side]) for side in ("forget", "retain"))
    sparse = sparsify(model, make_selection(model, units=5, forget=4))
    assert sorted({(part.category, len(part.index)) for part in sparse.parts}) == [("conflict", 5), ("forget", 4)]
    checkpointing(model)
    GradientDifference(retain_weight=0.7).loss(model, batches, sparse)[0].backward()
    for part in sparse.parts:
        reached = 0.7 * retain[part.path] if part.category == "conflict" else 0.0
        expected = (reached - forget[part.path]).index_select(part.dim, part.index)
        assert (part.selected.grad - expected).norm() < 1e-5 * expected.norm(), part


@pytest.mark.slow
def test_compiled(make_model, make_selection, make_batch):
    """In one graph, with the gradients of the plain model."""
    model, batches = make_model(layers=2), {"forget": make_batch(3, seed=1), "retain": make_batch(4, seed=2)}
    sparse = sparsify(model, make_selection(model, units=5, forget=4))
    GradientDifference().loss(model, batches, sparse)[0].backward()
    expected = [p.grad.clone() for p in sparse.trainable_parameters]
    model.zero_grad()
    torch._dynamo.reset()
    for layer in model.model.layers:
        layer.mlp.compile(backend="aot_eager", fullgraph=True)
    GradientDifference().loss(model, batches, sparse)[0].backward()
    for one, p in zip(expected, sparse.trainable_parameters, strict=True):
        torch.testing.assert_close(p.grad, one)


def test_a_pass_that_is_not_announced_reaches_all(make_model, make_selection, make_batch):
    """As in a stock Trainer; also after a pass that was announced, and after one that was not run."""
    model, batch = make_model(), make_batch(3)
    expected = dense_gradients(copy.deepcopy(model), batch)
    sparse = sparsify(model, make_selection(model, units=2, forget=3))
    GradientDifference().loss(model, {"forget": batch, "retain": batch}, sparse)[0].backward()
    sparse.reach(0, 1, 1)
    model(**make_batch(1))
    model.zero_grad()
    GradientAscent().loss(model, {"forget": batch}, sparse)[0].backward()
    for part in sparse.parts:
        found = -expected[part.path].index_select(part.dim, part.index)
        assert (part.selected.grad - found).norm() < 1e-5 * found.norm(), part


def test_only_forget_units(make_model, make_selection, make_batch):
    """The retain loss then trains nothing at all."""
    model, batches = make_model(), {"forget": make_batch(3, seed=1), "retain": make_batch(4, seed=2)}
    twin = copy.deepcopy(model)
    sparse, other = (sparsify(m, make_selection(m, units=0, forget=4)) for m in (model, twin))
    GradientDifference(retain_weight=100.0).loss(model, batches, sparse)[0].backward()
    GradientAscent().loss(twin, {"forget": batches["forget"]}, other)[0].backward()
    for one, two in zip(sparse.trainable_parameters, other.trainable_parameters, strict=True):
        assert (one.grad - two.grad).norm() < 1e-5 * two.grad.norm()


def test_retain_records_alone_leave_forget_units_alone(make_model, make_selection, make_batch):
    model, batch = make_model(), make_batch(3)
    sparse = sparsify(model, make_selection(model, units=2, forget=3))
    sparse.reach(0, 3, batch["input_ids"].shape[1])
    model(**batch).loss.backward()
    assert {(part.category, part.selected.grad is None) for part in sparse.parts} == {
        ("conflict", False),
        ("forget", True),
    }


def test_the_hook_goes_with_restore(make_model, make_selection):
    model = make_model()
    with sparsify(model, make_selection(model, forget=2)):
        assert len(model._forward_pre_hooks) == 1
    assert not model._forward_pre_hooks
    with sparsify(model, make_selection(model)):
        assert not model._forward_pre_hooks


def test_rows_of_a_pass():
    reach = Reach(announced=Pass(2, 5, 7))
    assert reach.rows(torch.zeros(5, 7, 3), "x") == 5
    reach.begin()
    assert reach.rows(torch.zeros(5, 7, 3), "x") == 2
    assert reach.rows(torch.zeros(5, 4, 3), "x") == 2  # the tokens of an encoder
    assert reach.rows(torch.zeros(35, 3), "x") == 14  # flattened
    for odd in (torch.zeros(6, 7, 3), torch.zeros(34, 3), torch.zeros(5, 3)):
        with pytest.raises(SparseError, match=r"layers\.0 is .* 5 records of 7 tokens"):
            reach.rows(odd, "layers.0")


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
        for part, master in zip(trainer.sparse.parts, masters, strict=True):
            if not torch.equal(part.selected, master):
                moved[-1].add(part.category)
            master.copy_(part.selected.detach())

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
            assert self.records(trainer) == {"forget": 5, "retain": 5}
            assert trainer.objective.retain_weight == 0.0
            trainer.sparse.restore()


def test_a_stage_without_units_is_skipped_and_named(make_model, make_staged, caplog):
    trainer = make_staged(make_model(), "clue", forget=0)
    assert [stage.units for stage in trainer.stages] == [("conflict",)] and trainer.args.num_train_epochs == 5
    named = [record.getMessage() for record in caplog.records if record.name == "clue_fast.trainer.stages"]
    assert named == ["the stage of forget units is skipped: the selection has none"]
    before = [p.detach().clone() for p in trainer.sparse.trainable_parameters]
    trainer.train()
    assert trainer.state.global_step == 10
    assert not any(torch.equal(p, q) for p, q in zip(trainer.sparse.trainable_parameters, before, strict=True))


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


def test_a_stage_runs_no_backward_below_its_lowest_unit(make_model, make_selection, make_batch):
    model, batches = make_model(layers=4), {"forget": make_batch(seed=1), "retain": make_batch(seed=2)}
    selection = make_selection(model, units=3, layers=[1], forget=2)
    other = make_selection(model, units=3, layers=[3])
    for site in selection.sites:
        selection.categories[site] = torch.maximum(selection.categories[site], other.categories[site])
    sparse = sparsify(model, selection)
    reached: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: reached.append(out.requires_grad))
    for part in sparse.parts:  # as if the units of layer 1 were all forget units
        part.category = "forget" if part.layer == 1 else "conflict"
    sparse.train_only("conflict")
    GradientDifference().loss(model, batches, sparse)[0].backward()
    assert reached == [False, False, False, True]
    assert {part.layer for part in sparse.parts if part.selected.grad is not None} == {3}


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
