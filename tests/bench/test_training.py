"""The training benchmark: what it counts, on models whose bytes are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

training = pytest.importorskip("bench.model.bench_training", reason="the benchmark compares with peft")


def test_saved_storages_are_those_that_the_backward_needs() -> None:
    """A linear layer saves its input, a sigmoid its output; weights are the model's own, a view its whole storage."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Sigmoid())
    whole = torch.randn(10, 6)
    with training.saved_storages(model) as saved:
        out = model(whole[:4])
    assert sorted(saved.values()) == [4 * 5 * 4, 10 * 6 * 4]
    out.sum().backward()
    with training.saved_storages(model) as saved, torch.no_grad():
        model(whole)
    assert saved == {}


def test_what_two_layers_share_counts_once() -> None:
    model = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
    x = torch.randn(4, 6)
    with training.saved_storages(model) as saved:
        outs = [layer(x) for layer in model]
    assert sorted(saved.values()) == [4 * 6 * 4]
    del outs


def test_bytes_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours has float32 gradients, and two moments, of the selected weights; full of all."""
    for name, size in {"WIDTH": 64, "UNITS": 100, "VOCABULARY": 50}.items():
        monkeypatch.setattr(training, name, size)
    point = training.Point(fraction=0.1, records=1, tokens=8, depth=2, width=64)
    tokens = torch.randint(50, (1, 8))
    batch = {"input_ids": tokens, "labels": tokens}
    count = training.ours(training.make_model(point), point).bytes(batch)
    selected = 2 * 3 * 10 * 64
    assert (count["trained"], count["gradients"], count["state"]) == (selected, 4 * selected, 8 * selected)
    model = training.make_model(point)
    weights = sum(parameter.numel() for parameter in model.parameters())
    count = training.full_with_mask(model, point).bytes(batch)
    steps = 4 * len(list(model.parameters()))  # torch counts its steps in a float32 a tensor
    assert (count["trained"], count["gradients"], count["state"]) == (weights, 4 * weights, 8 * weights + steps)


def test_the_mask_leaves_gradients_of_selected_weights_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"WIDTH": 64, "UNITS": 100, "VOCABULARY": 50}.items():
        monkeypatch.setattr(training, name, size)
    point = training.Point(fraction=0.1, lowest=1, depth=2, width=64)
    model = training.make_model(point)
    method = training.full_with_mask(model, point)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    method.mask()
    kept = {name: int(parameter.grad.sum()) for name, parameter in model.named_parameters() if parameter.grad.any()}
    assert kept == {f"model.layers.1.mlp.{module}.weight": 640 for module in training.MODULES}


def test_the_methods_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method has its sample of each phase in every round, and a line of the table."""
    for name, size in {"WIDTH": 64, "UNITS": 100, "VOCABULARY": 50}.items():
        monkeypatch.setattr(training, name, size)
    point = training.Point(fraction=0.1, records=1, tokens=8, depth=2, width=64)
    one = training.Training(point, seconds=0.0)
    assert one.rounds == training.ROUNDS[0]
    for _ in range(2):
        one.round()
    found = one.measurement
    assert set(found.samples) == set(training.METHODS)
    assert all(len(times) == 2 for phases in found.samples.values() for times in phases.values())
    assert "ours / LoRA" in found.steps.ratios()
    lines = found.steps.table().splitlines()
    assert all(any(line.strip().startswith(method) for line in lines) for method in training.METHODS)
