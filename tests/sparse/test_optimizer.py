"""SparseAdamW is AdamW on the selected part, in any dtype, and leaves every other bit alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from clue_fast.errors import SettingError, SparseError
from clue_fast.selection import Selection
from clue_fast.sparse import SparseAdamW, SparseSGD, changed_inside, changed_outside, snapshot, sparsify
from clue_fast.sparse.slices import trainable_slices

DTYPES = [torch.float32, torch.bfloat16]
STOCHASTIC = {"master_weights": False, "stochastic_rounding": True}


def backward(model: Any, batch: dict[str, Tensor]) -> None:
    model.zero_grad()
    model(**batch).loss.backward()


def steps(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor], count: int) -> None:
    for _ in range(count):
        backward(model, batch)
        optimizer.step()


def masters(model: Any) -> Tensor:
    return torch.cat([part.master().flatten() for part in trainable_slices(model)])


def plant_delicate_bits(model: Any, selection: Selection, batch: dict[str, Tensor]) -> None:
    """A step that adds 0 to what it should leave alone turns -0.0 into 0.0, and a NaN into another."""
    unused = min(set(range(64)) - set(batch["input_ids"].flatten().tolist()))
    with torch.no_grad():
        row = model.model.embed_tokens.weight[unused]
        integer = {2: torch.int16, 4: torch.int32}[row.element_size()]
        row.view(integer).copy_(torch.full_like(row, torch.inf).view(integer) + torch.arange(1, len(row) + 1))
        assert row.isnan().all()
        for site in selection.sites:
            outside = [unit for unit in range(site.width) if unit not in selection.units(site)]
            model.get_submodule(site.inputs[0]).weight[outside[0]] = -0.0
            model.get_submodule(site.output).weight[:, outside[1]] = -0.0


@pytest.mark.parametrize(
    ("dtype", "make", "settings"),
    [
        pytest.param(torch.float32, SparseAdamW, {}, marks=pytest.mark.slow),
        (torch.bfloat16, SparseAdamW, {}),
        pytest.param(torch.bfloat16, SparseAdamW, STOCHASTIC, marks=pytest.mark.slow),
        pytest.param(torch.float32, SparseSGD, {"momentum": 0.9, "lr": 1e-2}, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, SparseSGD, {"momentum": 0.9, "lr": 1e-2}, marks=pytest.mark.slow),
    ],
)
def test_every_bit_outside_stays_and_inside_moves(
    dtype, make, settings, make_model, make_selection, make_batch, tmp_path
):
    """100 steps with weight decay and momentum, interrupted in the middle and resumed from files."""
    model, batch = make_model(dtype), make_batch()
    plant_delicate_bits(model, make_selection(model), batch)
    selection = make_selection(model)
    before = snapshot(model)
    straight, broken = copy.deepcopy(model), copy.deepcopy(model)

    sparsify(straight, selection)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "layer_lr": 0.3, **settings}
    optimizer = make(straight, **settings, seed=3)
    steps(straight, optimizer, batch, 100)

    sparsify(broken, selection)
    first = make(broken, **settings, seed=3)
    steps(broken, first, batch, 50)
    torch.save(broken.state_dict(), tmp_path / "model.pt")
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    resumed = copy.deepcopy(model)
    sparsify(resumed, selection)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    second = make(resumed, **settings | {"lr": 1.0, "weight_decay": 0.0})  # these and the seed come from the file
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    steps(resumed, second, batch, 50)

    trained = masters(straight).numel()
    assert changed_outside(before, straight, selection) == 0
    assert changed_outside(before, resumed, selection) == 0
    assert changed_inside(before, straight, selection) > 0.98 * trained
    assert torch.equal(masters(straight), masters(resumed))
    keeps_masters = dtype != torch.float32 and "master_weights" not in settings
    assert {part.has_values for part in trainable_slices(straight)} == {keeps_masters}
    assert changed_outside(snapshot(straight), resumed, selection) == 0
    assert changed_inside(snapshot(straight), resumed, selection) == 0


def test_equals_torch_adamw_through_a_model(make_model, make_selection, make_batch):
    """Dense AdamW, with what is not selected put back after every step."""
    model, batch = make_model(), make_batch()
    dense = copy.deepcopy(model)
    selection = make_selection(model)
    sparse = sparsify(model, selection)
    optimizer = SparseAdamW(model, lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, layer_lr=1.0)
    trained = {part.path: dense.get_parameter(part.path) for part in sparse.slices}
    reference = torch.optim.AdamW(trained.values(), lr=1e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    start = {path: weight.detach().clone() for path, weight in trained.items()}
    for _ in range(20):
        backward(dense, batch)
        reference.step()
        with torch.no_grad():
            for part in sparse.slices:
                kept = trained[part.path].index_select(part.dim, part.index)
                trained[part.path].copy_(start[part.path]).index_copy_(part.dim, part.index, kept)
        steps(model, optimizer, batch, 1)
    for path, expected in trained.items():
        error = (model.get_parameter(path) - expected).norm() / expected.norm()
        assert error < 1e-6, path
        assert not torch.equal(model.get_parameter(path), start[path])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_equals_torch_sgd_through_a_model(momentum, make_model, make_selection, make_batch):
    """As above, with the state of SGD: nothing without momentum."""
    model, batch = make_model(), make_batch()
    dense = copy.deepcopy(model)
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseSGD(model, lr=0.1, momentum=momentum, weight_decay=0.1, layer_lr=1.0)
    weights = {part.path: dense.get_parameter(part.path) for part in sparse.slices}
    start = {path: weight.detach().clone() for path, weight in weights.items()}
    reference = torch.optim.SGD(weights.values(), lr=0.1, momentum=momentum, weight_decay=0.1)
    for _ in range(10):
        for one, chosen in ((dense, reference), (model, optimizer)):
            backward(one, batch)
            chosen.step()
        with torch.no_grad():
            for part in sparse.slices:
                kept = weights[part.path].index_select(part.dim, part.index)
                weights[part.path].copy_(start[part.path]).index_copy_(part.dim, part.index, kept)
    for path, expected in weights.items():
        assert (model.get_parameter(path) - expected).norm() < 1e-6 * expected.norm(), path
        assert not torch.equal(model.get_parameter(path), start[path])
    trained = sum(p.nbytes for p in sparse.trainable_parameters)
    assert sparse.memory_footprint(optimizer)["optimizer_state"] == (trained if momentum else 0)
    adamw = SparseAdamW(model)
    steps(model, adamw, batch, 1)
    for one, other in ((optimizer, adamw), (adamw, optimizer)):
        with pytest.raises(SparseError, match="does not fit"):
            one.load_state_dict(other.state_dict())


def test_float32_weights_are_their_own_masters(make_model, make_selection, make_batch):
    """Beside 16-bit weights too, whose values exist; and a cast to 16 bits leaves the values that the weights had."""
    model, batch = make_model(), make_batch()
    for layer in model.model.layers:
        layer.mlp.down_proj.to(torch.bfloat16)
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: args[0].bfloat16())
        layer.mlp.down_proj.register_forward_hook(lambda _, args, out: out.float())
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-3)
    copied = [part for part in sparse.slices if part.name == "weight" and part.dim == 1]
    assert copied == [part for part in sparse.slices if part.has_values]
    assert sparse.memory_footprint()["values"] == 4 * sum(part.values.numel() for part in copied)
    steps(model, optimizer, batch, 3)
    own = [part for part in sparse.slices if part not in copied]
    assert all(not torch.equal(part.master(), part.original.float()) for part in sparse.slices)
    assert {part.values.untyped_storage().nbytes() for part in own} == {4}
    before = [part.read() for part in own]
    model.to(torch.bfloat16)
    assert all(torch.equal(part.values, now) for part, now in zip(own, before, strict=True))
    saved = optimizer.state_dict()["state"].values()
    assert all(torch.equal(one["master"], part.values) for one, part in zip(saved, sparse.slices, strict=True))


def test_bf16_loses_no_update(make_model, make_selection, make_batch):
    """Masters equal fp32 AdamW fed the same gradients; plain AdamW in bf16 hardly moves a weight at this rate."""
    model, batch = make_model(torch.bfloat16, initializer_range=0.02), make_batch()
    plain, selection = copy.deepcopy(model), make_selection(model)
    before = snapshot(model)
    sparse = sparsify(model, selection)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in sparse.trainable_parameters]
    optimizer = SparseAdamW(model, lr=1e-6, weight_decay=0.1, layer_lr=1.0)
    reference = torch.optim.AdamW(copies, lr=1e-6, weight_decay=0.1)
    for _ in range(60):
        backward(model, batch)
        for copied, p in zip(copies, sparse.trainable_parameters, strict=True):
            copied.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    expected = torch.cat([p.detach().flatten() for p in copies])
    assert (masters(model) - expected).norm() < 1e-6 * expected.norm()
    for part in sparse.slices:
        assert torch.equal(part.read(), part.values.detach().to(torch.bfloat16))
    own = changed_inside(before, model, selection)
    torch_optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-6, weight_decay=0.1)
    steps(plain, torch_optimizer, batch, 60)
    # Weights of about 0.02 lie 1e-4 apart in bf16: half of them round elsewhere after 60 steps of 1e-6.
    assert own > 0.4 * len(expected)
    assert changed_inside(before, plain, selection) < 0.03 * len(expected)


def test_bf16_follows_the_fp32_trajectory(make_model, make_selection, make_batch):
    """As far, within 2 %, and in the same direction; gradients from a bf16 backward differ by percents."""
    model, batch = make_model(torch.bfloat16), make_batch(32)
    full = copy.deepcopy(model)
    for parameter in full.parameters():
        parameter.data = parameter.data.float()
    moved = []
    for one in (model, full):
        sparsify(one, make_selection(one))
        start = masters(one)
        steps(one, SparseAdamW(one, lr=1e-6, weight_decay=0.1, layer_lr=1.0), batch, 50)
        moved.append(masters(one) - start)
    assert abs(moved[0].norm() / moved[1].norm() - 1) < 0.02
    assert torch.cosine_similarity(*moved, dim=0) > 0.99


def test_stochastic_rounding_keeps_no_masters_and_follows_the_fp32_trajectory(make_model, make_selection, make_batch):
    """Fed the same gradients, in the mean: within three standard errors of the distance along the way of fp32."""
    model, batch = make_model(torch.bfloat16, initializer_range=0.02), make_batch()
    sparse = sparsify(model, make_selection(model, units=24))
    start = [part.read().float() for part in sparse.slices]
    copies = [torch.nn.Parameter(values.clone()) for values in start]
    optimizer = SparseAdamW(model, lr=1e-6, weight_decay=0.1, layer_lr=1.0, **STOCHASTIC)
    assert {p.untyped_storage().nbytes() for p in sparse.trainable_parameters} == {4}
    assert sparse.memory_footprint()["values"] == 0
    reference = torch.optim.AdamW(copies, lr=1e-6, weight_decay=0.1)
    for _ in range(100):
        backward(model, batch)
        for copied, p in zip(copies, sparse.trainable_parameters, strict=True):
            copied.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    moved = torch.cat([(part.read().float() - s).flatten() for part, s in zip(sparse.slices, start, strict=True)])
    exact = torch.cat([(copied.detach() - s).flatten() for copied, s in zip(copies, start, strict=True)])
    along = moved @ exact / (exact @ exact)
    error = ((moved - exact) * exact).norm() / (exact @ exact)
    assert abs(along - 1) < 3 * error
    assert error < 0.02


def test_masters_can_be_given_up_and_made_again(make_model, make_selection, make_batch):
    model, batch = make_model(torch.bfloat16), make_batch()
    sparse = sparsify(model, make_selection(model))
    steps(model, SparseAdamW(model, lr=1e-3), batch, 3)
    rough = SparseAdamW(model, lr=1e-3, **STOCHASTIC)
    steps(model, rough, batch, 3)
    model.to(torch.float32)
    assert {p.untyped_storage().nbytes() for p in sparse.trainable_parameters} == {4}
    model.to(torch.bfloat16)
    twin = copy.deepcopy(model)
    steps(twin, SparseAdamW(twin, lr=1e-3, **STOCHASTIC), batch, 1)
    exact = SparseAdamW(model, lr=1e-3)
    for part in sparse.slices:
        assert torch.equal(part.values, part.read().float())
    exact.load_state_dict(rough.state_dict())
    steps(model, exact, batch, 1)
    sparse.revert()
    for part in sparse.slices:
        assert torch.equal(part.values, part.original.float())


def test_small_updates_are_kept_in_one_way(make_model, make_selection, make_batch):
    model = make_model(torch.bfloat16)
    sparse = sparsify(model, make_selection(model))
    with pytest.raises(SettingError, match=r"exclude each other.*set master_weights=False"):
        SparseAdamW(model, stochastic_rounding=True)
    with pytest.raises(SettingError, match=r"gate_proj.weight is torch.bfloat16, which drops small updates"):
        SparseAdamW(model, master_weights=False)
    sparse.restore()
    finals = []
    for masters in (True, False):  # of float32 weights no update is lost either way
        model = make_model()
        sparsify(model, make_selection(model))
        steps(model, SparseAdamW(model, lr=1e-3, master_weights=masters), make_batch(), 2)
        finals.append(model.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_every_seed_rounds_otherwise(make_model, make_selection, make_batch):
    def weights(seed: int) -> Tensor:
        model = make_model(torch.bfloat16)
        sparse = sparsify(model, make_selection(model))
        steps(model, SparseAdamW(model, lr=1e-4, **STOCHASTIC, seed=seed), make_batch(), 1)
        return torch.cat([part.read().flatten() for part in sparse.slices])

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(
    value, make_model, make_selection, make_batch, caplog
):
    model, batch = make_model(torch.bfloat16), make_batch()
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-3)
    steps(model, optimizer, batch, 2)
    weights, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    backward(model, batch)
    part = sparse.slices[4]
    part.values.grad[1, 2] = value
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert part.path in caplog.text and "1 of 9 weights" in caplog.text
    assert all(torch.equal(weights[name], now) for name, now in snapshot(model).items())
    for number, entry in optimizer.state_dict()["state"].items():
        assert entry["step"] == 2
        assert all(torch.equal(entry[k], state["state"][number][k]) for k in ("exp_avg", "exp_avg_sq", "master"))
    steps(model, optimizer, batch, 1)
    assert optimizer.skipped_steps == 1


def test_a_large_finite_gradient_is_no_reason_to_skip(make_model, make_selection, make_batch):
    """Its square overflows float32, it does not."""
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-3)
    model(**make_batch()).loss.backward()
    part = sparse.slices[0]
    part.values.grad[1] = 3e38
    before = part.read()
    optimizer.step()
    assert optimizer.skipped_steps == 0
    assert not torch.equal(part.read()[0], before[0])


def test_tensors_without_gradient_are_skipped(make_model, make_selection, make_batch):
    model, batch = make_model(), make_batch()
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-3)
    backward(model, batch)
    frozen = sparse.trainable_parameters[0]
    frozen.grad = None
    before = sparse.slices[0].read()
    optimizer.step()
    assert torch.equal(sparse.slices[0].read(), before)
    assert frozen not in optimizer.state and len(optimizer.state) == 8
    fresh = SparseAdamW(model)
    fresh.load_state_dict(optimizer.state_dict())  # also with state for some tensors only
    assert frozen not in fresh.state and len(fresh.state) == 8
    entry = fresh.state[sparse.trainable_parameters[1]]
    assert entry["exp_avg"] is not optimizer.state[sparse.trainable_parameters[1]]["exp_avg"]
    model.zero_grad()
    with pytest.raises(SparseError, match="no selected weight has a gradient"):
        optimizer.step()


def test_closure(make_model, make_selection, make_batch):
    model, batch = make_model(), make_batch()
    sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model)

    def closure() -> float:
        backward(model, batch)
        return 3.0

    assert optimizer.step(closure) == 3.0


def test_refuses_what_does_not_fit(make_model, make_selection, make_batch):
    model = make_model()
    with pytest.raises(SparseError, match="sparsify"):
        SparseAdamW(model)
    sparsify(model, make_selection(model))
    for wrong in ({"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"weight_decay": -0.1}, {"layer_lr": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SparseAdamW(model, **wrong)
    optimizer = SparseAdamW(model)
    for units, seed, message in ((5, 1, "other units"), (6, 0, "does not fit")):
        other = make_model()
        sparsify(other, make_selection(other, units=units, seed=seed))
        with pytest.raises(SparseError, match=message):
            optimizer.load_state_dict(SparseAdamW(other).state_dict())
    dense = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(SparseError, match="does not fit"):
        optimizer.load_state_dict(dense.state_dict())
    backward(model, make_batch())
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.data = parameter.data.bfloat16()
    with pytest.raises(SparseError, match="they must stay float32"):
        optimizer.step()
