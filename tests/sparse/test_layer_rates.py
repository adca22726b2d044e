"""Learning rates by layer: geometric, linear, named, computed; and that the optimizer trains at them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clue_fast.sparse import LinearLayerRate, SparseAdamW, sparsify
from clue_fast.sparse.layer_rates import layer_scale


@given(ratio=st.floats(1e-3, 1e3), layers=st.integers(2, 100))
def test_a_ratio_means_the_same_at_any_depth(ratio, layers):
    scales = [layer_scale(ratio, layer, layers) for layer in range(layers)]
    assert scales[0] == 1.0
    assert scales[-1] == pytest.approx(ratio)
    steps = [b / a for a, b in itertools.pairwise(scales)]
    assert max(steps) == pytest.approx(min(steps))


@given(ratio=st.floats(0.0, 1e3), layers=st.integers(2, 100))
def test_linear_rates_differ_by_the_same_amount(ratio, layers):
    scales = [layer_scale(LinearLayerRate(ratio), layer, layers) for layer in range(layers)]
    assert scales[0] == 1.0
    assert scales[-1] == pytest.approx(ratio, abs=1e-12)
    steps = [b - a for a, b in itertools.pairwise(scales)]
    assert max(steps) == pytest.approx(min(steps), abs=1e-9)


@pytest.mark.parametrize("layer_lr", [0.2, 1.0, 5.0, LinearLayerRate(0.2)])
def test_a_single_layer_has_the_full_rate(layer_lr):
    assert layer_scale(layer_lr, 0, 1) == 1.0


@pytest.mark.parametrize(
    ("layer_lr", "expected"),
    [
        (0.25, [1.0, 0.5, 0.25]),
        (1.0, [1.0, 1.0, 1.0]),
        (4.0, [1.0, 2.0, 4.0]),
        (LinearLayerRate(0.2), [1.0, 0.6, 0.2]),
        ({0: 0.5, 1: 2.0, 2: 0.0}, [0.5, 2.0, 0.0]),
        (lambda layer, layers: 1 / (1 + layer) + layers, [4.0, 3.5, 3 + 1 / 3]),
    ],
)
def test_every_layer_moves_at_its_own_rate(layer_lr, expected, make_model, make_selection, make_batch):
    """The first step of Adam moves a weight by its rate, whatever the gradient."""
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-3, eps=0.0, layer_lr=layer_lr)
    assert [group["layer"] for group in optimizer.param_groups] == [0, 1, 2]
    assert [group["layer_scale"] for group in optimizer.param_groups] == pytest.approx(expected)
    model(**make_batch()).loss.backward()
    optimizer.step()
    for group, scale in zip(optimizer.param_groups, expected, strict=True):
        assert len(group["params"]) == 3
        for parameter in group["params"]:
            part = next(part for part in sparse.slices if part.values is parameter)
            moved = (part.master() - part.original).abs().median()
            assert float(moved) == pytest.approx(1e-3 * scale, rel=1e-3)


def test_a_scheduler_keeps_the_proportions(make_model, make_selection):
    model = make_model(layers=5)
    sparsify(model, make_selection(model, layers=[0, 2, 3]))
    optimizer = SparseAdamW(model, lr=1e-3, layer_lr=0.2)
    assert [group["layer"] for group in optimizer.param_groups] == [0, 2, 3]
    expected = [1e-3 * 0.2 ** (layer / 4) for layer in (0, 2, 3)]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert schedule.get_last_lr() == pytest.approx([0.5 * rate for rate in expected])


@pytest.mark.parametrize(
    ("layer_lr", "message"),
    [
        (0.0, "layer_lr 0.0 is not above 0"),
        (-1.0, "not above 0"),
        (math.nan, "not above 0"),
        (math.inf, "not above 0"),
        ({0: 1.0, 1: 1.0}, "nothing of layer 2"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "names layer 3, the model has layers 0 to 2"),
        ({0: 1.0, 1: -0.5, 2: 1.0}, "layer 1 the scale -0.5"),
        (lambda layer, layers: math.nan, "layer 0 the scale nan"),
    ],
)
def test_refuses_rates_that_are_none(layer_lr, message, make_model, make_selection):
    model = make_model()
    sparsify(model, make_selection(model))
    with pytest.raises(ValueError, match=message):
        SparseAdamW(model, layer_lr=layer_lr)


@pytest.mark.parametrize("ratio", [-0.1, math.nan, math.inf])
def test_refuses_a_linear_ratio_below_zero(ratio):
    with pytest.raises(ValueError, match="ratio"):
        LinearLayerRate(ratio)
