"""Layers below the lowest one that trains: which passes run them, and that losses and gradients stay what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clue_fast.objectives import NPO, GradientDifference, passes
from clue_fast.recording import patch
from clue_fast.sparse import Sparse, SparseAdamW, sparsify
from clue_fast.trainer import UnlearnTrainer
from tests.models import families

CAUSAL = sorted(name for name, family in families.FAMILIES.items() if family.task == families.CAUSAL)
SOME = 2**20


@pytest.fixture
def make_late(make_model, make_selection) -> Callable[..., tuple[Any, Sparse]]:
    """make_late(lowest=2, **config) -> a Llama of four layers of which those from the lowest on train, and its Sparse.

    What its lower layers give is kept.
    """

    def make(lowest: int = 2, **config: Any) -> tuple[Any, Sparse]:
        model = make_model(layers=4, **config).train()
        sparse = sparsify(model, make_selection(model, layers=list(range(lowest, 4))))
        sparse.lower_layers.most_bytes = SOME
        return model, sparse

    return make


@pytest.fixture
def batches(make_batch) -> dict[str, Tensor]:
    return {"forget": make_batch(4, 1), "retain": make_batch(4, 2)}


def runs_of(monkeypatch: pytest.MonkeyPatch, layer: nn.Module) -> list[int]:
    """Records of each pass of a layer, seen in its attention without a hook."""
    seen: list[int] = []
    attention = layer.self_attn

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(hidden_states))
        return type(attention).forward(attention, hidden_states, *args, **kwargs)

    monkeypatch.setitem(vars(attention), "forward", forward)
    return seen


def step(model: Any, sparse: Sparse, batches: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient of everything that trains."""
    for parameter in sparse.trainable_parameters:
        parameter.grad = None
    loss, _ = GradientDifference().loss(model, batches, sparse)
    loss.backward()
    return loss.detach(), [torch.zeros(()) if p.grad is None else p.grad.clone() for p in sparse.trainable_parameters]


def test_lower_layers_run_once_for_each_record(make_late, batches, make_batch, monkeypatch):
    model, sparse = make_late()
    lower, upper = (runs_of(monkeypatch, model.model.layers[n]) for n in (1, 2))
    step(model, sparse, batches)
    first = len(lower)
    assert sum(lower) == sum(upper) == 8
    lower.clear()
    step(model, sparse, batches)
    assert sum(lower) == 1  # the trial whether a pass without them says the same
    lower.clear(), upper.clear()
    step(model, sparse, batches)
    assert not lower and sum(upper) == 8
    step(model, sparse, {"forget": batches["forget"], "retain": make_batch(4, 3)})
    assert first and sum(lower) >= 4  # passes with records that are new


def test_training_is_the_same(make_late, make_batch, monkeypatch):
    """Losses of eight steps to 1e-6, of which all but two skip the lower layers; the weights as near."""
    losses, weights = [], []
    for most_bytes in (0, SOME):
        model, sparse = make_late()
        sparse.lower_layers.most_bytes = most_bytes
        lower = runs_of(monkeypatch, model.model.layers[0])
        optimizer = SparseAdamW(model, lr=1e-3)
        found = []
        for number in range(8):
            own = {"forget": make_batch(4, number % 2), "retain": make_batch(4, 2 + number % 2)}
            loss, _ = step(model, sparse, own)
            optimizer.step()
            found.append(loss)
        assert sum(lower) == (8 * 8 if not most_bytes else 2 * 8 + 1)
        losses.append(torch.stack(found))
        weights.append(torch.cat([trained.read().flatten() for trained in sparse.slices]))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family(family, make_selection):
    """Whatever upper layers read of lower ones beside their output, a step gives what it gives without this."""
    model = families.make_model(family)
    layers = sorted({site.layer for site in make_selection(model).sites})
    if len(layers) < 2:
        pytest.skip("of one layer there is nothing below")
    batch = families.make_batch(family)
    batch = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    batch["labels"] = batch["input_ids"].clone()
    sparse = sparsify(model, make_selection(model, units=2, layers=layers[-1:]))
    assert sparse.lower_layers.layers
    expected, gradients = step(model, sparse, {"forget": batch, "retain": batch})
    sparse.lower_layers.most_bytes = SOME
    for _ in range(3):
        loss, found = step(model, sparse, {"forget": batch, "retain": batch})
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        for own, its in zip(found, gradients, strict=True):
            torch.testing.assert_close(own, its, rtol=1e-5, atol=1e-6)


def test_an_upper_layer_that_reads_a_lower_one(make_late, batches, monkeypatch):
    """The trial with the first record shows it, and every layer keeps running."""
    model, sparse = make_late()
    seen: dict[str, Tensor] = {}
    below, above = model.model.layers[0].mlp, model.model.layers[3].mlp
    monkeypatch.setitem(vars(below), "forward", lambda x: seen.setdefault("x", type(below).forward(below, x)))
    monkeypatch.setitem(vars(above), "forward", lambda x: type(above).forward(above, x) + seen.pop("x").mean())
    lower = runs_of(monkeypatch, model.model.layers[1])
    expected, _ = step(model, sparse, batches)
    for _ in range(2):
        lower.clear()
        assert step(model, sparse, batches)[0] == expected
        assert sum(lower) >= 8


@pytest.mark.parametrize("what", ["dropout", "hook", "recording", "left", "groups", "nothing"])
def test_where_every_layer_runs(what, make_late, batches, monkeypatch):
    model, sparse = make_late(**({"attention_dropout": 0.1} if what == "dropout" else {}))
    if what == "hook":
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: None)
    if what == "left":
        batches = {name: {key: t.flip(1) for key, t in batch.items()} for name, batch in batches.items()}
    if what == "groups":
        groups = {name: torch.ones_like(batch["labels"]) for name, batch in batches.items()}
        batches = {name: {**batch, "token_group": groups[name].to(torch.int8)} for name, batch in batches.items()}
    with patch(model) as patched:
        sparse.lower_layers.forbidden = lambda: patched.is_recording
        lower = runs_of(monkeypatch, model.model.layers[1])
        for _ in range(3):
            lower.clear()
            if what == "recording":
                with patched.record("forget", tokens="attended"):
                    step(model, sparse, batches)
            else:
                step(model, sparse, batches)
        assert sum(lower) == (0 if what == "nothing" else 8)


def test_modules_are_looked_at_once_a_step_and_in_every_step(make_late, batches, monkeypatch):
    """However many passes it has; a hook that comes between two steps is seen by the second."""
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 0, "cuda": 0})  # a pass for every length
    model, sparse = make_late()
    looked: list[Any] = []
    skippable = type(sparse.lower_layers).skippable
    monkeypatch.setattr(sparse.lower_layers, "skippable", lambda of: looked.append(of) or skippable(kept, of))
    kept, lower = sparse.lower_layers, runs_of(monkeypatch, model.model.layers[1])
    step(model, sparse, batches)
    assert len(lower) > 2 and len(looked) == 1
    step(model, sparse, batches)
    lower.clear()
    step(model, sparse, batches)
    assert not lower and len(looked) == 3
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    step(model, sparse, batches)
    assert sum(lower) == 8 and len(looked) == 4
    handle.remove()
    model.model.layers[3].self_attn.attention_dropout = 0.1
    step(model, sparse, batches)
    assert sum(lower) == 16
    model.model.layers[3].self_attn.attention_dropout = 0.0
    step(model, sparse, batches)
    assert sum(lower) == 16


def test_no_more_is_kept_than_fits(make_late, batches):
    model, sparse = make_late()
    sparse.lower_layers.most_bytes = 40 * 32 * 4  # of some of the 64 tokens or so
    expected, _ = step(model, sparse, batches)
    for _ in range(2):
        loss, _ = step(model, sparse, batches)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert 0 < sparse.lower_layers.bytes <= sparse.lower_layers.most_bytes


def test_nothing_is_kept_past_other_weights_units_and_the_end(make_late, make_selection, batches):
    model, sparse = make_late()
    kept = sparse.lower_layers
    step(model, sparse, batches)
    assert kept.bytes > 0
    model.load_state_dict(model.state_dict())
    assert kept.bytes == 0
    step(model, sparse, batches)
    sparse.reselect(make_selection(model, layers=[1]))
    assert kept.bytes == 0 and len(kept.layers) == 1
    step(model, sparse, batches)
    sparse.restore()
    assert kept.bytes == 0
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_the_original_is_that_of_all_layers_after_other_units_have_trained(make_late, make_selection, batches):
    """Layers that trained before are swapped with the others, whatever is kept of them."""
    model, sparse = make_late(lowest=1)
    with torch.no_grad():
        expected = model(input_ids=batches["forget"]["input_ids"]).logits
    for trained in sparse.slices:
        trained.set_values(trained.original + 0.1)
    sparse.reselect(make_selection(model, layers=[3], seed=1))
    for _ in range(2):
        NPO().loss(model, batches, sparse)
    with sparse.original(), torch.no_grad():
        assert torch.equal(model(input_ids=batches["forget"]["input_ids"]).logits, expected)


def test_nothing_is_kept_unless_asked(make_model, make_selection, batches):
    model = make_model(layers=4)
    sparse = sparsify(model, make_selection(model, layers=[3]))
    step(model, sparse, batches)
    assert len(sparse.lower_layers.layers) == 3 and sparse.lower_layers.bytes == 0
    sparse.restore()
    sparse = sparsify(model, make_selection(model))
    sparse.lower_layers.most_bytes = SOME
    step(model, sparse, batches)
    assert not sparse.lower_layers.layers and sparse.lower_layers.bytes == 0


@pytest.fixture
def train(make_model, make_selection, make_examples, make_arguments) -> Iterator[Callable[..., Any]]:
    """train(**settings) -> a trainer of four epochs over the upper half of four layers, that has run."""

    def run(checkpointing: bool = False, **settings: Any) -> UnlearnTrainer:
        model = make_model(layers=4)
        args = make_arguments(num_train_epochs=4, gradient_checkpointing=checkpointing)
        trainer = UnlearnTrainer(
            model=model,
            args=args,
            forget_dataset=make_examples(4, 1),
            retain_dataset=make_examples(4, 2),
            retain_ratio=1,
            objective="gradient_difference",
            selection=make_selection(model, layers=[2, 3]),
            **settings,
        )
        trainer.train()
        return trainer

    return run


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_keeps_them(checkpointing, train, make_examples):
    every, some = train(checkpointing, lower_layers_gb=0.0), train(checkpointing)
    assert every.sparse.lower_layers.bytes == 0
    tokens = sum(len(example["input_ids"]) for seed in (1, 2) for example in make_examples(4, seed))
    assert some.sparse.lower_layers.bytes == 32 * 4 * tokens
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (every, some)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-4)  # as they are logged
