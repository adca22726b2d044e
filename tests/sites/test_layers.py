"""The layers of a model of any family: as many as its configuration says, in their order, with all of its units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.planning.depth import find_depth
from clue_fast.sites.layers import LayerList, find_layers
from clue_fast.sparse.lower_layers import layers_below
from tests.models import families
from tests.models.small_llama import llama

DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers")


def make(name: str) -> Any:
    """A model of a family, without data."""
    family = families.FAMILIES[name]
    if not hasattr(transformers, family.config):
        pytest.skip("not in this transformers")
    config = getattr(transformers, family.config)(**family.settings)
    with torch.device("meta"):
        return getattr(transformers, f"AutoModelFor{family.task}").from_config(config)


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_every_family(name):
    """The modules that the numbers after the path of the list name, whose reading is independent of how it is found."""
    model = make(name)
    text = model.config.get_text_config(decoder=True)
    depth = next(getattr(text, key) for key in DEPTHS if getattr(text, key, None))
    found = find_layers(model)
    assert len(found.modules) == depth
    paths = {id(module): path for path, module in model.named_modules()}
    assert [paths[id(layer)] for layer in found.modules] == [f"{found.path}.{number}" for number in range(depth)]
    own = sum(p.numel() for layer in found.modules for p in layer.parameters())
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(found.path):
            assert sum(p.numel() for p in module.parameters()) <= own, path
    assert find_depth(model).path == found.path
    assert layers_below(model, [f"{found.path}.{depth - 1}.anything"]) == list(found.modules[:-1])


def test_what_is_where():
    model = llama(torch.float32, layers=3)
    found = find_layers(model)
    assert found.path == "model.layers" and list(found.modules) == list(model.model.layers)
    assert found.number_of("model.layers.2") == found.number_of("model.layers.2.mlp.up_proj.weight") == 2
    assert found.number_of("model.layers") is found.number_of("lm_head.weight") is None
    assert [layer.path for layer in find_architecture(model).layers] == [f"model.layers.{n}" for n in range(3)]


def test_of_several_towers_that_which_holds_the_paths():
    small, large = ([nn.Linear(width, width) for _ in range(3)] for width in (2, 4))
    model = nn.ModuleDict({"a": nn.ModuleList(small), "b": nn.ModuleList([nn.ModuleList(large), nn.Linear(1, 1)])})
    assert find_layers(model).path == "b"  # the outer list, of which the inner one is a layer
    assert find_layers(model, ["a.1.weight", "a.2"]).path == "a"
    assert layers_below(model, ["a.1.weight", "a.2"]) == small[:1]
    assert layers_below(model, ["a.1.weight", "b.1"]) == layers_below(model, []) == []
    assert find_layers(nn.Linear(2, 2)) == LayerList() and LayerList().number_of("weight") is None
