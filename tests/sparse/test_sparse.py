"""A sparse model computes the same bits, trains nothing else, is saved plainly and can be turned back."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from clue_fast.errors import NonFiniteError, SelectionError, SparseError
from clue_fast.selection import Selection
from clue_fast.sparse import SparseAdamW, snapshot, sparsify
from clue_fast.sparse.slices import trainable_slices

DTYPES = [torch.float32, torch.bfloat16]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def train(model: Any, batch: dict[str, torch.Tensor], steps: int, lr: float = 1e-3) -> SparseAdamW:
    optimizer = SparseAdamW(model, lr=lr, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_loss_keep_their_bits(dtype, make_model, make_selection, make_batch):
    model, batch = make_model(dtype), make_batch()
    plain = model(**batch)
    sparsify(model, make_selection(model))
    sparse = model(**batch)
    assert torch.equal(bits(plain.logits), bits(sparse.logits))
    assert torch.equal(plain.loss, sparse.loss)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masters_are_the_selected_weights(dtype, make_model, make_selection):
    model = make_model(dtype)
    selection = make_selection(model)
    sparse = sparsify(model, selection)
    for site in selection.sites:
        units = selection.units(site)
        for path, dim in ((site.inputs[0], 0), (site.inputs[1], 0), (site.output, 1)):
            (part,) = [part for part in sparse.slices if part.path == f"{path}.weight"]
            weight = model.get_submodule(path).weight.double()
            expected = torch.stack([weight.select(dim, int(u)) for u in units], dim)
            assert part.values.dtype == torch.float32
            assert torch.equal(part.values.double(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_that_of_the_dense_weight(dtype, make_model, make_selection, make_batch):
    """At most twice the error that the dense backward makes in the same dtype, against float64."""
    model, batch = make_model(dtype), make_batch(6)
    exact, dense = copy.deepcopy(model).double(), copy.deepcopy(model)
    for other in (exact, dense):
        other(**batch).loss.backward()
    sparse = sparsify(model, make_selection(model))
    model(**batch).loss.backward()
    for part in sparse.slices:
        true, own = (
            other.get_parameter(part.path).grad.double().index_select(part.dim, part.index) for other in (exact, dense)
        )
        allowed = 2 * (own - true).norm() + 1e-7 * true.norm()
        assert (part.values.grad.double() - true).norm() <= allowed, part.path


def test_only_masters_train_and_nothing_runs_below_the_lowest_layer(make_model, make_selection, make_batch):
    model, batch = make_model(layers=4), make_batch()
    sparse = sparsify(model, make_selection(model, layers=[2]))
    reached = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: reached.append(torch.is_tensor(out) and out.requires_grad))
    model(**batch).loss.backward()
    assert reached == [False, False, True, True]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        f"model.layers.2.mlp.{name}_proj.values_weight_conflict" for name in ("gate", "up", "down")
    ]
    assert [id(p) for p in model.parameters() if p.requires_grad] == [id(p) for p in sparse.trainable_parameters]


def test_bytes_are_counted_for_the_selected_part_only(make_model, make_selection, make_batch):
    model = make_model(torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    sparse = sparsify(model, make_selection(model, units=5))
    optimizer = train(model, make_batch(), 2)
    trained = 3 * 3 * 5 * 32 * 4  # layers, projections, units, hidden size, float32
    assert sparse.memory_footprint(optimizer) == {
        "weights": weights,
        "values": trained,
        "original": trained // 2,
        "gradients": trained,
        "optimizer_state": 2 * trained,
    }
    assert sparse.memory_footprint()["optimizer_state"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_checkpoint_is_plain(dtype, make_model, make_selection, make_batch, tmp_path):
    from transformers import LlamaForCausalLM

    model, batch = make_model(dtype), make_batch()
    keys = list(model.state_dict())
    sparsify(model, make_selection(model))
    train(model, batch, 3)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(bits(model.eval()(**batch).logits), bits(loaded(**batch).logits))
    assert not list(trainable_slices(loaded))


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_refreshes_the_masters(strict, make_model, make_selection, make_batch):
    model, other = make_model(torch.bfloat16), make_model(torch.bfloat16, seed=1)
    sparse = sparsify(model, make_selection(model))
    result = model.load_state_dict(other.state_dict(), strict=strict)
    assert not result.missing_keys and not result.unexpected_keys
    for part in sparse.slices:
        assert torch.equal(part.values, part.read().float())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({}, strict=True)


def test_deepcopy_trains_on_its_own(make_model, make_selection, make_batch):
    model, batch = make_model(), make_batch()
    sparsify(model, make_selection(model))
    twin = copy.deepcopy(model)
    before = snapshot(model)
    train(twin, batch, 2)
    assert all(torch.equal(before[name], now) for name, now in snapshot(model).items())
    train(model, batch, 2)
    assert torch.equal(model(**batch).logits, twin(**batch).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_restore_gives_back_classes_flags_and_dicts(dtype, make_model, make_selection, make_batch):
    model, batch = make_model(dtype), make_batch()
    model.model.embed_tokens.weight.requires_grad_(False)
    classes = [type(module) for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    dicts = [set(vars(module)) for module in model.modules()]
    with sparsify(model, make_selection(model)) as sparse:
        train(model, batch, 2)
        trained = snapshot(model)
        logits = model(**batch).logits
    assert [type(module) for module in model.modules()] == classes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert [set(vars(module)) for module in model.modules()] == dicts
    assert all(torch.equal(trained[name], now) for name, now in snapshot(model).items())
    assert torch.equal(bits(logits), bits(model(**batch).logits))
    sparse.restore()  # again: nothing happens
    sparsify(model, make_selection(model))  # and it can be done again


@pytest.mark.parametrize("dtype", DTYPES)
def test_original_swaps_exactly(dtype, make_model, make_selection, make_batch):
    model, batch = make_model(dtype), make_batch()
    reference = copy.deepcopy(model)
    sparse = sparsify(model, make_selection(model))
    optimizer = train(model, batch, 5)
    trained = {name: bits(tensor) for name, tensor in snapshot(model).items()}
    with sparse.original() as original:
        assert torch.equal(bits(original(**batch).logits), bits(reference(**batch).logits))
        assert not torch.is_grad_enabled()
        with pytest.raises(SparseError, match="do not nest"), sparse.original():
            pass
        with pytest.raises(SparseError, match="holds its original weights"):
            optimizer.step()
    assert all(torch.equal(trained[name], bits(now)) for name, now in snapshot(model).items())
    with pytest.raises(ZeroDivisionError), sparse.original():
        raise ZeroDivisionError
    assert all(torch.equal(trained[name], bits(now)) for name, now in snapshot(model).items())


def test_backward_across_a_swap_raises(make_model, make_selection, make_batch):
    """Rather than to compute a gradient with weights that were not there in the forward."""
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    loss = model(**make_batch()).loss
    with sparse.original():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_is_a_model_with_other_weights(dtype, make_model, make_selection, make_batch):
    """Its logits and its gradients; the reference has the weights written by hand, one unit at a time."""
    model, batch = make_model(dtype), make_batch()
    sparse = sparsify(model, make_selection(model))
    train(model, batch, 3)
    draw = torch.Generator().manual_seed(0)
    offsets = [torch.randn(values.shape, generator=draw) * 0.1 for values in sparse.trainable_parameters]
    other = copy.deepcopy(model)
    for one, offset in zip(sparse.slices, offsets, strict=True):
        weight = other.get_parameter(one.path).data
        for place, unit in enumerate(one.index.tolist()):
            weight.select(one.dim, unit).copy_((one.master() + offset).select(one.dim, place))
    values = [parameter.detach().clone() for parameter in sparse.trainable_parameters]
    before = {name: bits(tensor) for name, tensor in snapshot(model).items()}
    with sparse.moved(offsets) as moved:
        output = moved(**batch)
        found = torch.autograd.grad(output.loss, sparse.trainable_parameters)
        with sparse.original():
            pass
        assert torch.equal(bits(moved(**batch).logits), bits(output.logits))
    expected = other(**batch)
    assert torch.equal(bits(output.logits), bits(expected.logits))
    parameters = [one.values for one in trainable_slices(other)]
    for gradient, same in zip(found, torch.autograd.grad(expected.loss, parameters), strict=True):
        assert torch.equal(gradient, same)
    assert all(torch.equal(before[name], bits(now)) for name, now in snapshot(model).items())
    assert all(torch.equal(one, now) for one, now in zip(values, sparse.trainable_parameters, strict=True))


def test_moved_comes_back_whatever_happens(make_model, make_selection, make_batch):
    model = make_model(torch.bfloat16)
    sparse = sparsify(model, make_selection(model))
    before, offsets = snapshot(model), [torch.ones_like(values) for values in sparse.trainable_parameters]
    with pytest.raises(ZeroDivisionError), sparse.moved(offsets):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="shorter"), sparse.moved(offsets[1:]):
        pass
    with sparse.original(), pytest.raises(SparseError, match="holds its original weights"), sparse.moved(offsets):
        pass
    assert all(torch.equal(before[name], now) for name, now in snapshot(model).items())
    loss = model(**make_batch()).loss
    with sparse.moved(offsets):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_revert_undoes_the_training(make_model, make_selection, make_batch):
    model, batch = make_model(torch.bfloat16), make_batch()
    before = snapshot(model)
    sparse = sparsify(model, make_selection(model))
    train(model, batch, 5)
    sparse.revert()
    assert all(torch.equal(before[name], now) for name, now in snapshot(model).items())
    for part in sparse.slices:
        assert torch.equal(part.values, part.original.float())


def test_casting_keeps_the_masters(make_model, make_selection, make_batch):
    model, batch = make_model(), make_batch()
    sparse = sparsify(model, make_selection(model))
    optimizer = train(model, batch, 2)
    masters = [part.master() for part in sparse.slices]
    model.to(torch.bfloat16)
    for part, master in zip(sparse.slices, masters, strict=True):
        assert part.weight.dtype == part.original.dtype == torch.bfloat16
        assert torch.equal(part.values, master)
    model(**batch).loss.backward()
    optimizer.step()
    assert not any(torch.equal(part.values, master) for part, master in zip(sparse.slices, masters, strict=True))


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, limited, make_model, make_selection, make_batch):
    """And reaches no layer below the lowest selected one, if it is told not to."""
    model, batch = make_model(layers=4), make_batch()
    sparse = sparsify(model, make_selection(model, layers=[2, 3]))
    model.train()
    model(**batch).loss.backward()
    expected = [p.grad.clone() for p in sparse.trainable_parameters]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if limited:
        sparse.limit_checkpointing()
    inputs: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch).loss.backward()
    assert inputs[:2] == [not limited] * 2
    for gradient, p in zip(expected, sparse.trainable_parameters, strict=True):
        assert torch.equal(gradient, p.grad)


def test_autocast(make_model, make_selection, make_batch):
    """Under bf16 autocast a sparse model is what the plain one is, forward and backward."""
    model, batch = make_model(), make_batch()
    dense = copy.deepcopy(model)
    sparse = sparsify(model, make_selection(model))
    losses = []
    for one in (dense, model):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(one(**batch).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for part in sparse.slices:
        expected = dense.get_parameter(part.path).grad.index_select(part.dim, part.index)
        # The dense gradient is rounded to bfloat16, by half a unit in its last place: 2 ** -9.
        torch.testing.assert_close(part.values.grad, expected, rtol=2**-8, atol=float(expected.abs().max()) * 2**-9)


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _tie(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _replace(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.__class__ = Doubled


def _transpose(model: Any) -> None:
    module = model.model.layers[1].mlp.up_proj
    module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())


def _hold_a_view(model: Any) -> None:
    """Somebody else holds some rows of a weight, transposed."""
    rows = model.model.layers[1].mlp.up_proj.weight.detach()[3:]
    model.model.layers[0].held = nn.Parameter(rows.t())


def _quantize(model: Any) -> None:
    module = model.model.layers[1].mlp.up_proj
    module.weight = nn.Parameter(module.weight.detach().to(torch.uint8), requires_grad=False)


def _shard(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.placements = ()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_tie, r"layers\.0\.mlp\.up_proj\.weight is tied to .*layers\.1"),
        (_replace, r"layers\.1\.mlp\.up_proj\.weight is that of a Doubled, which does more than multiply"),
        (_transpose, r"layers\.1\.mlp\.up_proj\.weight is not contiguous; set it to its contiguous\(\)"),
        (_hold_a_view, r"layers\.1\.mlp\.up_proj\.weight is tied to model\.layers\.0\.held; untie it"),
        (lambda model: model.double(), r"float64; load the model in float32"),
        (_quantize, r"layers\.1\.mlp\.up_proj\.weight is torch\.uint8; load the model in float32"),
        (_shard, r"layers\.1\.mlp\.up_proj\.weight is sharded already .*sparse\.fully_shard"),
    ],
)
def test_refuses_what_it_cannot_train(spoil, message, make_model, make_selection):
    model = make_model()
    spoil(model)
    selection = make_selection(model)
    classes, flags = [type(m) for m in model.modules()], [p.requires_grad for p in model.parameters()]
    with pytest.raises(SparseError, match=message):
        sparsify(model, selection)
    assert [type(m) for m in model.modules()] == classes
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_weight_that_is_not_finite(value, make_model, make_selection):
    model = make_model()
    selection = make_selection(model)
    site = selection.sites[1]
    with torch.no_grad():
        model.get_submodule(site.output).weight[3, selection.units(site)[0]] = value
    with pytest.raises(NonFiniteError, match=rf"{site.output}\.weight"):
        sparsify(model, selection)


def test_refuses_a_wrong_selection(make_model, make_selection):
    model = make_model()
    with pytest.raises(SelectionError):
        sparsify(model, make_selection(model, units=0))
    with pytest.raises(SelectionError):
        sparsify(model, make_selection(make_model(seed=1)))
    sparse = sparsify(model, make_selection(model))
    with pytest.raises(SparseError, match="sparse already"):
        sparsify(model, make_selection(model))
    assert "15 units in 9 modules" in repr(sparse)
    assert "trained: 5 of 48 along 1 of weight (conflict)" in repr(model.model.layers[0].mlp.down_proj)


def test_refuses_units_that_overlap_or_do_not_exist(make_model, make_selection):
    """Sites as a file might hold them that somebody has edited."""
    model = make_model(intermediate_size=32)
    selection = make_selection(model)
    site, other = selection.sites[0], selection.sites[1]
    selection.categories[other] = selection.categories[site]
    cases = [
        (replace(other, slices=site.slices), SparseError, "two selected units own the same slice of model.layers.0"),
        (replace(other, slices=(replace(site.slices[0], dim=1), *other.slices[1:])), SparseError, "rows and columns"),
        (replace(other, slices=(replace(other.slices[0], offset=30),)), SelectionError, "belong to different models"),
        (replace(other, slices=(replace(other.slices[0], parameter="no.weight"),)), SelectionError, "does not have"),
    ]
    for wrong, error, message in cases:
        sites = (site, wrong, *selection.sites[2:])
        pairs = list(zip(sites, selection.sites, strict=True))
        categories, scores = (
            {one: values[old] for one, old in pairs} for values in (selection.categories, selection.scores)
        )
        bad = Selection(sites, categories, scores, {}, selection.fingerprint)
        with pytest.raises(error, match=message):
            sparsify(model, bad)
        assert not list(trainable_slices(model)) and all(p.requires_grad for p in model.parameters())


def test_a_weight_and_its_bias_go_through_one_operator(make_model, make_selection, make_batch):
    """They share their index, wherever the model is moved to."""
    model, batch = make_model(mlp_bias=True), make_batch()
    dense = copy.deepcopy(model)
    dense(**batch).loss.backward()
    sparse = sparsify(model, make_selection(model))
    model.to(torch.bfloat16).to(torch.float32)
    nodes: set[str] = set()
    for layer in model.model.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, __, out: nodes.add(type(out.grad_fn).__name__))
    model(**batch).loss.backward()
    assert nodes == {"_DirectBackward"}
    biases = [part for part in sparse.slices if part.name == "bias"]
    assert len(biases) == 6
    for part in biases:
        weight = next(p for p in part.module.trainable_slices if p.name == "weight")
        assert part.index is weight.index
        expected = dense.get_parameter(part.path).grad[part.index]
        assert (part.values.grad - expected).norm() < 0.05 * expected.norm()  # the weights were rounded on the way
