"""What a few layers say of all, against a run of all: the same bytes and operations, whatever the layers are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers

from clue_fast.objectives import get_objective
from clue_fast.planning.depth import Depth, find_depth, peak_of, reduce_depth
from clue_fast.planning.methods import AllWeights, LowRank, Method, SelectedUnits
from clue_fast.planning.planned import _selection
from clue_fast.planning.step import Records, trace_step
from clue_fast.sites import survey
from tests.models.families import FAMILIES

LAYERS, MORE_LAYERS, PART = 9, 12, range(5, 12)
"""How many layers models have; and those of which a part trains."""
DROPPING = ("gpt2", "opt")
"""Families with dropout, in training of which no layer can be skipped."""
PERIODIC = ["sliding_attention", "sliding_attention", "full_attention"]
MORE: dict[str, dict[str, Any]] = {
    "gemma3": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4},
    "deepseek_v3": {"first_k_dense_replace": 2},
}
KINDS = ["selected", "part", "all", "float32", "lora"]
OTHERS = ["gpt2", "qwen2_moe", "deepseek_v3", "gpt_oss"]
OTHERS += ["phi3", "falcon grouped", "olmo2", "qwen3_moe", "gpt_neox", "opt", "mistral"]
SETS = {"forget": Records(2, 6, 4), "retain": Records(3, 6, 4)}


def make(name: str, layers: int = LAYERS) -> Any:
    family = FAMILIES[name]
    depth: dict[str, Any] = {"n_layer" if name == "gpt2" else "num_hidden_layers": layers}
    if "sliding_window" in MORE.get(name, {}):
        depth["layer_types"] = PERIODIC * (layers // len(PERIODIC))
    sizes = {"vocab_size": 83, **depth, **MORE.get(name, {})}  # a width that nothing else has
    config = getattr(transformers, family.config)(**{**family.settings, **sizes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).train()


def trace(model: Any, depth: Depth, kind: str) -> Any:
    """A step; "part": of the units of a part of the layers."""
    methods: dict[str, Method] = {"all": AllWeights(), "float32": AllWeights(torch.bfloat16), "lora": LowRank(2)}
    if kind in methods:
        return trace_step(model, depth, methods[kind], get_objective("npo"), SETS)
    found = survey(model)
    if kind == "part":
        found = replace(found, sites=tuple(site for site in found.sites if depth.trains(site.path)))
    method = SelectedUnits(_selection(model, found, 0.2), found)
    return trace_step(model, depth, method, get_objective("npo"), SETS)


@pytest.mark.parametrize(
    ("name", "kind", "checkpointing"),
    [
        *(pytest.param("llama", kind, False) for kind in KINDS),
        *(pytest.param("gemma3", kind, kind != "selected", marks=pytest.mark.slow) for kind in KINDS[:3]),
        # Two ways whose backward passes differ most: of every other architecture one, of some both, with layers anew.
        *(pytest.param(name, "selected", False, marks=pytest.mark.slow) for name in OTHERS),
        *(pytest.param(name, "all", True, marks=pytest.mark.slow) for name in OTHERS[:4]),
    ],
)
def test_some_layers_stand_for_all(name, kind, checkpointing):
    layers = MORE_LAYERS if kind == "part" else LAYERS
    model = make(name, layers)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    part = frozenset(PART if kind == "part" else ())
    depth = find_depth(model, part)
    every = tuple(range(layers))
    assert 4 <= len(depth.kept) < layers == len(depth.stands_in)
    whole = trace(model, Depth(depth.path, every, every, part), kind)
    reduce_depth(model, depth)
    found = trace(model, depth, kind)
    assert (found.forward_flop, found.backward_flop) == (whole.forward_flop, whole.backward_flop)
    assert found.activations == whole.activations and found.logits == whole.logits
    assert (found.lowest, found.lower_output) == (whole.lowest, whole.lower_output)
    assert found.lowest == (PART[0] if part else 0)
    assert (found.lower_output > 0) == (kind == "part" and name not in DROPPING)
    assert found.later_forward_flop(True, 0.5) == whole.later_forward_flop(True, 0.5)
    for size in ("values", "original", "gradient", "state"):
        assert found.bytes_of(size) == whole.bytes_of(size)
    runs = [[*step.original, *step.forward, *step.backward] for step in (found, whole)]
    assert len(runs[0]) == len(runs[1])
    assert peak_of(runs[0]) == peak_of(runs[1])


def test_what_stands_for_what():
    """The first two and the last two for themselves; of a kind behind them the second."""
    assert find_depth(make("llama")).kept == (0, 1, 2, 7, 8)
    assert find_depth(make("llama")).stands_in == (0, 1, 2, 2, 2, 2, 2, 3, 4)
    found = find_depth(make("gemma3"))  # full attention in the layers 2, 5 and 8
    assert found.kept == (0, 1, 2, 3, 5, 7, 8)
    assert [found.kept[place] for place in found.stands_in] == [0, 1, 2, 3, 3, 5, 3, 7, 8]


def test_what_stands_for_what_around_a_part_that_trains():
    """Its first two layers and its last two for themselves, and those beside it; none for one of another side."""
    found = find_depth(make("llama", MORE_LAYERS), PART)
    assert found.kept == (0, 1, 2, 4, 5, 6, 7, 10, 11)
    assert [found.kept[place] for place in found.stands_in] == [0, 1, 2, 2, 4, 5, 6, 7, 7, 7, 10, 11]
    assert found.trains("model.layers.4.mlp") and not found.trains("model.layers.3.mlp")
    between = find_depth(make("llama", MORE_LAYERS), range(2, 4))
    assert [between.kept[place] for place in between.stands_in] == [0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 10, 11]


def test_a_model_without_layers_runs_whole():
    assert find_depth(torch.nn.Linear(2, 2)) == Depth()
    assert Depth().total([("weight", 3), ("bias", 2)]) == 5
