"""Ways to make forgetting stay, against their definitions on a plain model of which every weight has a gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.unlearning.grid import Method
from bench.unlearning.staying import ForgettingElsewhere, RelearnedInside, SharpnessAware, reset, trainer_of
from clue_fast.objectives import GradientDifference
from clue_fast.selection import CONFLICT, Selection
from clue_fast.sites import find_sites, model_fingerprint
from clue_fast.sparse import changed_inside, changed_outside, snapshot, sparsify
from clue_fast.trainer import UnlearnTrainer

WEIGHT = 0.7


def losses(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """-log p of the answer tokens, averaged over the tokens of each record and then over the records."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0].double().log_softmax(-1)
        places = [place for place in range(1, len(ids)) if labels[place] != -100]
        total = total - sum(logits[place - 1, labels[place]] for place in places) / len(places)
    return total / len(batch["labels"])


class Plain:
    """A model of which everything has a gradient, and whose selected weights can be moved."""

    def __init__(self, model: Any, slices: Any) -> None:
        self.model, self.slices = model.double(), slices
        self.before = copy.deepcopy(self.model.state_dict())

    def gradient(self, batch: dict[str, Tensor], offsets: list[Tensor] | None = None) -> list[Tensor]:
        """Of ``losses``, by the weights of the slices, each moved by its offset."""
        self.model.load_state_dict(self.before)
        for one, offset in zip(self.slices, offsets or [], strict=offsets is not None):
            weight = self.model.get_parameter(one.path).data
            for place, unit in enumerate(one.index.tolist()):
                weight.select(one.dim, unit).add_(offset.select(one.dim, place))
        self.model.zero_grad()
        losses(self.model, batch).backward()
        found = ((self.model.get_parameter(one.path).grad, one) for one in self.slices)
        return [
            torch.stack([gradient.select(one.dim, unit) for unit in one.index.tolist()], one.dim)
            for gradient, one in found
        ]


@pytest.fixture
def make_trainer(make_model, make_selection, make_arguments, make_examples) -> Callable[..., Any]:
    """make_trainer(trainer_class) -> a trainer of gradient difference on random units of a small Llama."""

    def make(trainer_class: Any) -> Any:
        model = make_model()
        return trainer_class(
            model=model,
            args=make_arguments(),
            forget_dataset=make_examples(4, seed=1),
            retain_dataset=make_examples(4, seed=2),
            selection=make_selection(model),
            objective=GradientDifference(retain_weight=WEIGHT),
        )

    return make


def check_gradient(trainer: ForgettingElsewhere, expected: list[Tensor], batches: Any, plain_loss: float) -> None:
    loss = trainer.compute_loss(trainer.model, batches)
    assert loss.item() == pytest.approx(plain_loss, rel=1e-5)  # another gradient, not another loss
    loss.backward()
    for one, gradient in zip(trainer.sparse.slices, expected, strict=True):
        torch.testing.assert_close(one.values.grad.double(), gradient, rtol=2e-3, atol=2e-6)
        assert torch.equal(one.values.detach(), one.read())


def test_sharpness_takes_the_forget_gradient_where_it_is_worst(make_trainer, make_batch, make_model) -> None:
    radius = 0.5
    trainer = make_trainer(partial(SharpnessAware, radius))
    forget, retain = make_batch(seed=3), make_batch(seed=4)
    model = Plain(make_model(), trainer.sparse.slices)
    with torch.no_grad():
        loss = -losses(model.model, forget).item() + WEIGHT * losses(model.model, retain).item()
    ascent = [-gradient for gradient in model.gradient(forget)]  # of the forget term, -L
    length = math.sqrt(sum(float(gradient.square().sum()) for gradient in ascent))
    offsets = [gradient * radius / length for gradient in ascent]
    there, kept = model.gradient(forget, offsets), model.gradient(retain)
    expected = [-one + WEIGHT * other for one, other in zip(there, kept, strict=True)]
    plain = [-one + WEIGHT * other for one, other in zip(model.gradient(forget), kept, strict=True)]
    assert max(float((a - b).abs().max()) for a, b in zip(expected, plain, strict=True)) > 1e-2
    check_gradient(trainer, expected, {"forget": forget, "retain": retain}, loss)


@pytest.mark.parametrize("steps", [1, 3])
def test_relearning_inside_takes_the_forget_gradient_behind_steps_of_descent(
    steps, make_trainer, make_batch, make_model
) -> None:
    rate = 0.3
    trainer = make_trainer(partial(RelearnedInside, steps, rate))
    forget, retain = make_batch(seed=3), make_batch(seed=4)
    model = Plain(make_model(), trainer.sparse.slices)
    with torch.no_grad():
        loss = -losses(model.model, forget).item() + WEIGHT * losses(model.model, retain).item()
    offsets = [torch.zeros_like(gradient) for gradient in model.gradient(forget)]
    for _ in range(steps):
        descent = model.gradient(forget, offsets)
        offsets = [offset - rate * gradient for offset, gradient in zip(offsets, descent, strict=True)]
    there, kept = model.gradient(forget, offsets), model.gradient(retain)
    expected = [-one + WEIGHT * other for one, other in zip(there, kept, strict=True)]
    check_gradient(trainer, expected, {"forget": forget, "retain": retain}, loss)


@pytest.mark.parametrize("kinds", [("mlp",), ("attention_query", "attention_key_value")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["reads", "writes"])
def test_reset_units_are_the_mean_of_their_layer(kinds, dtype, what, make_model) -> None:
    model = make_model(dtype)
    selection, before = some_units(model, kinds), snapshot(model)
    sparse = sparsify(model, selection)
    reset(sparse, what)
    assert changed_outside(before, model, selection) == 0
    seen = 0
    for site in selection.sites:
        for owned in site.slices:
            weight, old = model.get_parameter(owned.parameter).detach(), before[owned.parameter].double()
            if ("down_proj" in owned.parameter or "o_proj" in owned.parameter) != (what == "writes"):
                assert torch.equal(weight, before[owned.parameter])
                continue
            for unit in selection.units(site).tolist():
                for place in range(owned.size):
                    rows = [
                        old.select(owned.dim, owned.index(torch.tensor([other]))[place]) for other in range(site.width)
                    ]
                    found = weight.select(owned.dim, owned.index(torch.tensor([unit]))[place])
                    torch.testing.assert_close(found, torch.stack(rows).mean(0).to(dtype), rtol=1e-2, atol=1e-6)
                    seen += 1
    assert seen
    for one in sparse.slices:
        assert torch.equal(one.values.detach(), one.read().float())
        old = before[one.path].index_select(one.dim, one.index)
        assert torch.equal(one.original, old)


def some_units(model: Any, kinds: tuple[str, ...]) -> Selection:
    """The second unit of every site, and the last."""
    sites = find_sites(model, kinds)
    categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
    for values in categories.values():
        values[[1, -1]] = CONFLICT
    scores = {site: torch.zeros(site.width) for site in sites}
    return Selection(sites, categories, scores, {}, model_fingerprint(model))


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Method(), UnlearnTrainer),
        (Method(reset="writes"), UnlearnTrainer),
        (Method(sharpness=0.1), SharpnessAware),
        (Method(relearn_inside=2, reset="reads"), RelearnedInside),
    ],
)
def test_the_trainer_of_a_method_trains_its_units_alone(method, expected, make_trainer, make_model) -> None:
    before = snapshot(make_model())
    trainer = make_trainer(trainer_of(method))
    assert type(trainer) is expected
    assert (changed_inside(before, trainer.model, trainer.sparse.selection) > 0) == (method.reset is not None)
    weights = snapshot(trainer.model)
    trainer.train()
    assert changed_outside(before, trainer.model, trainer.sparse.selection) == 0
    inside = sum(values.numel() for values in trainer.sparse.trainable_parameters)
    assert changed_inside(weights, trainer.model, trainer.sparse.selection) > 0.9 * inside


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reset": "rows"}, "'rows' is none of: reads, writes"),
        ({"positions": "end"}, "'end' is none of: answer, subject"),
        ({"sharpness": 0.1, "relearn_inside": 1}, "choose one"),
        ({"train": "lora", "rounds": 2}, "rounds is a setting of the training of units; this method trains lora"),
        ({"train": "all", "sharpness": 0.1}, "sharpness is a setting of the training of units"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method(**settings)
