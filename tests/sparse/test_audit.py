"""The audit sees every bit: inside, outside, in buffers, of -0.0 and of NaN."""

from __future__ import annotations

import pytest
import torch

from clue_fast.errors import SparseError
from clue_fast.sparse import changed_inside, changed_outside, snapshot, sparsify


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_inside_and_outside(dtype, in_file, make_model, make_selection, tmp_path):
    model = make_model(dtype)
    selection = make_selection(model)
    before = snapshot(model, tmp_path if in_file else None)
    site = selection.sites[1]
    inside, outside = selection.units(site), [u for u in range(site.width) if u not in selection.units(site)]
    with torch.no_grad():
        model.get_submodule(site.inputs[0]).weight[inside[0], :7] += 1
        model.get_submodule(site.inputs[0]).weight[outside[0], :2] += 1
        model.get_submodule(site.output).weight[:3, inside[1]] += 1
        model.get_submodule(site.output).weight[:4, outside[1]] += 1
        model.lm_head.weight[0, 0] += 1
        model.model.rotary_emb.inv_freq[0] += 1
    assert changed_inside(before, model, selection) == 7 + 3
    assert changed_outside(before, model, selection) == 2 + 4 + 1 + 1
    sparsify(model, selection)  # the same, whether sparse or not
    assert changed_inside(before, model, selection) == 7 + 3
    assert changed_outside(before, model, selection) == 2 + 4 + 1 + 1


def test_compares_bits_and_not_values(make_model, make_selection):
    model = make_model()
    selection = make_selection(model)
    weight = model.lm_head.weight
    with torch.no_grad():
        weight[0, :2] = torch.tensor([0.0, float("nan")])
    before = snapshot(model)
    assert changed_outside(before, model, selection) == 0
    with torch.no_grad():
        weight[0, 0] = -0.0
        weight.view(torch.int32)[0, 1] ^= 1  # another NaN
    assert changed_outside(before, model, selection) == 2


def test_refuses_another_model(make_model, make_selection):
    model = make_model()
    selection = make_selection(model)
    for other in (make_model(layers=2), make_model(torch.bfloat16)):
        with pytest.raises(SparseError, match="another model"):
            changed_outside(snapshot(other), model, selection)


def test_a_file_holds_every_bit_and_leaves_nothing(make_model, tmp_path):
    model = make_model(torch.bfloat16)
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("none", torch.zeros(0, 4, dtype=torch.bool))
    model.register_buffer("spectrum", torch.randn(2, 3, dtype=torch.complex64).t())
    kept, stored = snapshot(model), snapshot(model, tmp_path)
    assert list(stored) == list(kept) and len(stored) == len(kept)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.count):
            tensor.zero_()
    for name, tensor in kept.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError):
        snapshot(model, tmp_path / "missing")
    stored._file.truncate(10)
    with pytest.raises(OSError, match="cut off"):
        stored[name]
