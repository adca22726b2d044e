"""What a few layers say of all, against a run of all: the same bytes and operations, whatever the layers are."""

from __future__ import annotations

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

LAYERS = 9
PERIODIC = ["sliding_attention", "sliding_attention", "full_attention"] * 3
MORE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": LAYERS},
    "gemma3": {"layer_types": PERIODIC, "sliding_window": 4},
    "gpt_oss": {"layer_types": PERIODIC, "sliding_window": 4},
    "deepseek_v3": {"first_k_dense_replace": 2},
}
QUICK = ["llama", "gpt2", "gemma3", "qwen2_moe"]
OTHERS = ["deepseek_v3", "gpt_oss", "phi3", "falcon grouped", "olmo2", "qwen3_moe", "gpt_neox", "opt", "mistral"]
SETS = {"forget": Records(2, 6, 4), "retain": Records(3, 6, 4)}


def make(name: str) -> Any:
    family = FAMILIES[name]
    depth = {} if "n_layer" in MORE.get(name, {}) else {"num_hidden_layers": LAYERS}
    sizes = {"vocab_size": 83, **depth, **MORE.get(name, {})}  # a width that nothing else has
    config = getattr(transformers, family.config)(**{**family.settings, **sizes})
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config).train()


def trace(model: Any, depth: Depth, kind: str) -> Any:
    methods: dict[str, Method] = {"all": AllWeights(), "float32": AllWeights(torch.bfloat16), "lora": LowRank(2)}
    if kind in methods:
        return trace_step(model, depth, methods[kind], get_objective("npo"), SETS)
    found = survey(model)
    method = SelectedUnits(_selection(model, found, 0.2), found)
    return trace_step(model, depth, method, get_objective("npo"), SETS)


@pytest.mark.parametrize("kind", ["selected", "all", "float32", "lora"])
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_some_layers_stand_for_all(name, kind, checkpointing):
    model = make(name)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    depth = find_depth(model)
    every = tuple(range(LAYERS))
    assert 4 <= len(depth.kept) < LAYERS == len(depth.stands_in)
    whole = trace(model, Depth(depth.path, every, every), kind)
    reduce_depth(model, depth)
    found = trace(model, depth, kind)
    assert (found.forward_flop, found.backward_flop) == (whole.forward_flop, whole.backward_flop)
    assert found.activations == whole.activations and found.logits == whole.logits
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


def test_a_model_without_layers_runs_whole():
    assert find_depth(torch.nn.Linear(2, 2)) == Depth()
    assert Depth().total([("weight", 3), ("bias", 2)]) == 5
