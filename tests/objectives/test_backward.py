"""Passes that are run backward one by one against one graph over all: loss, logs, gradients, and what is alive."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from clue_fast.objectives import DPO, NPO, OBJECTIVES, RMU, UNDIAL, GradientDifference, SimNPO, get_objective, passes
from clue_fast.objectives.base import Objective
from clue_fast.recording import patch
from clue_fast.sparse import sparsify

APART = [name for name, objective in OBJECTIVES.items() if objective.by_record]


@pytest.fixture(autouse=True)
def many_passes(monkeypatch):
    """A pass for every length."""
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 0, "cuda": 0})


@pytest.fixture
def make_step(make_model, make_selection, make_batch):
    """make_step(forget=0) -> a sparse model, trained away from its original, and the batches of a step."""

    def make(forget=0, **config):
        model = make_model(**config)
        sparse = sparsify(model, make_selection(model, forget=forget))
        for number, trained in enumerate(sparse.slices):
            trained.set_values(trained.original + 0.05 * (-1) ** number)
        batches = {"forget": make_batch(5), "alternate": make_batch(5, seed=3), "retain": make_batch(3, seed=1)}
        return model, sparse, batches

    return make


def run(objective: Any, step: Any, by_pass: bool, scale: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model, sparse, batches = step
    sparse.backward_by_pass = by_pass
    loss, logs = objective.loss(model, batches, sparse)
    (scale * loss).backward()
    return loss, logs


def gradients_of(sparse: Any) -> list[Any]:
    return [None if p.grad is None else p.grad.clone() for p in sparse.trainable_parameters]


def is_apart(loss: torch.Tensor) -> bool:
    return type(loss.grad_fn).__name__ == "_KnownBackward"


@pytest.mark.parametrize("forget", [0, 3])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_equals_one_graph(name, forget, make_step):
    """Every objective, with units of both categories too; what is scaled and accumulated hands the gradients on."""
    objective = get_objective(name, retain_weight=0.7, **({"layer": 1} if name == "rmu" else {}))
    step = make_step(forget)
    expected, wanted = run(objective, step, False, 0.5)
    expected_gradients = gradients_of(step[1])
    found, logs = run(objective, step, True, 0.5)
    assert is_apart(found) == (name in APART) and not is_apart(expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert logs.keys() == wanted.keys() and not any(value.requires_grad for value in logs.values())
    for label, value in logs.items():
        torch.testing.assert_close(value, wanted[label], rtol=1e-5, atol=1e-6)
    for own, before in zip(gradients_of(step[1]), expected_gradients, strict=True):
        assert (own is None) == (before is None)
        if own is not None:  # the second step was added to the first
            torch.testing.assert_close(own, 2 * before, rtol=1e-4, atol=1e-6 * float(before.abs().max() + 1))


def test_those_that_look_at_one_record_at_a_time():
    assert sorted(set(OBJECTIVES) - set(APART)) == ["dpo", "rmu"]
    assert not DPO.by_record and not RMU.by_record


def test_gradients_of_before_stay_until_the_backward(make_step):
    model, sparse, batches = make_step()
    sparse.backward_by_pass = True
    kept = []
    for parameter in sparse.trainable_parameters:
        parameter.grad = torch.ones(parameter.shape)
        kept.append(parameter.grad)
    loss, _ = NPO().loss(model, batches, sparse)
    assert all(p.grad is before for p, before in zip(sparse.trainable_parameters, kept, strict=True))
    assert all(bool((before == 1).all()) for before in kept)
    loss.backward()
    assert any(bool((p.grad != 1).any()) for p in sparse.trainable_parameters)

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        NPO(retain_weight=0.5).loss(model, batches, sparse)
    handle.remove()
    assert all(p.grad is before for p, before in zip(sparse.trainable_parameters, kept, strict=True))


class Alive:
    """How many numbers autograd keeps that are no weights, and the most of it."""

    def __init__(self, model: Any) -> None:
        self.now = self.most = 0
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(self, tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage().data_ptr() in self.weights else Kept(self, tensor)


class Kept:
    def __init__(self, alive: Alive, tensor: torch.Tensor) -> None:
        self.alive, self.tensor = alive, tensor
        alive.now += tensor.numel()
        alive.most = max(alive.most, alive.now)

    def __del__(self) -> None:
        self.alive.now -= self.tensor.numel()


def test_the_activations_of_one_pass_are_alive(make_step):
    step = make_step()
    model, _, batches = step
    most = []
    for by_pass in (False, True):
        alive = Alive(model)
        with torch.autograd.graph.saved_tensors_hooks(alive.pack, lambda kept: getattr(kept, "tensor", kept)):
            run(GradientDifference(), step, by_pass)
        assert alive.now == 0
        most.append(alive.most)
    assert len(passes.passes_of(model, {name: batches[name] for name in ("forget", "retain")})) >= 4
    assert most[1] < most[0] / 2


@pytest.mark.parametrize("why", ["a hook", "a later hook", "no gradients", "one pass", "not asked for"])
def test_one_graph_where_it_might_change_something(why, make_step, monkeypatch):
    model, sparse, batches = make_step()
    sparse.backward_by_pass = why != "not asked for"
    some = sparse.trainable_parameters[0]
    if why == "a hook":
        some.register_hook(lambda grad: 2 * grad)
    if why == "a later hook":
        some.register_post_accumulate_grad_hook(lambda parameter: None)
    if why == "one pass":
        monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 10**6, "cuda": 10**6})
    with torch.set_grad_enabled(why != "no gradients"):
        loss, _ = SimNPO().loss(model, batches, sparse)
    assert not is_apart(loss) and loss.requires_grad == (why != "no gradients")


def test_a_term_of_ones_own_is_not_known_to_be_of_each_record(make_step):
    """It may look at the whole batch, such as here, whatever it was derived from."""

    @dataclass(frozen=True)
    class Centered(NPO):
        name: ClassVar[str] = "centered"

        def forget_term(self, current: Any, original: Any) -> torch.Tensor:
            terms = super().forget_term(current, original)
            return (terms - terms.mean()).square()

    @dataclass(frozen=True)
    class Said(NPO):
        name: ClassVar[str] = "said"
        by_record: ClassVar[bool] = True

        def forget_term(self, current: Any, original: Any) -> torch.Tensor:
            return 2 * super().forget_term(current, original)

    @dataclass(frozen=True)
    class Another(UNDIAL):
        name: ClassVar[str] = "another"
        strength: float = 3.0

    assert not Objective.by_record
    for objective, apart in ((Centered(), False), (Said(), True), (Another(), True)):
        assert is_apart(run(objective, make_step(), True)[0]) == apart


def test_a_recording_sees_every_pass(make_step):
    """Activations, and gradients of the loss, of every token, once."""
    statistics = []
    for by_pass in (False, True):
        model, sparse, batches = make_step()
        for name, group in (("forget", 1), ("retain", 2)):
            batches[name]["token_group"] = (batches[name]["labels"] != -100).to(torch.int8) * group
        sparse.backward_by_pass = by_pass
        objective = GradientDifference()
        with patch(model, strict=False) as patched, patched.record("forget", gradients=True):
            loss, _ = objective.loss(model, batches, sparse)
            loss.backward()
        assert is_apart(loss) == by_pass
        statistics.append(copy.deepcopy(patched.statistics))
    one, apart = statistics
    torch.testing.assert_close(apart.count, one.count, rtol=0.0, atol=0.0)
    torch.testing.assert_close(apart.values, one.values, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(apart.gradient_values, one.gradient_values, rtol=1e-4, atol=1e-7)
