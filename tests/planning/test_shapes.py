"""Configurations by their names, and what is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from clue_fast.errors import ModelError, SettingError, UnknownNameError
from clue_fast.planning import SHAPES
from clue_fast.planning.shapes import find_config, make_model

BILLIONS = {
    "smollm2-135m": 0.134515,
    "llama3-1b": 1.235814,
    "llama3-3b": 3.212750,
    "llama3-8b": 8.030261,
    "qwen3-14b": 14.768307,
    "qwen3-32b": 32.762123,
    "llama3-70b": 70.553706,
    "mixtral-8x7b": 46.702793,
    "qwen3-30b-a3b": 30.532123,
}
"""Parameters that the published checkpoints have."""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asks the network: it cannot be reached."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_of_the_published_models(name):
    model = make_model(find_config(name))
    assert {p.device.type for p in model.parameters()} == {"meta"} and model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1e9 * BILLIONS[name], rel=1e-6)


def test_a_folder_and_its_sizes(tmp_path):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50
    )
    config.save_pretrained(tmp_path)
    assert make_model(find_config(tmp_path)).config.hidden_size == 64
    found = make_model(find_config(tmp_path, {"num_hidden_layers": 5, "tie_word_embeddings": True}), "float16")
    assert (len(found.model.layers), found.dtype) == (5, torch.float16)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_kind_of_model_with_sizes_has_the_heads_that_follow_from_them():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    found = find_config("llama", sizes)
    assert (found.head_dim, found.hidden_size) == (16, 64)


@pytest.mark.parametrize("name", ["lama", "a/b/c", "./nowhere", "t5", "", "/"])
def test_unknown_architectures(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = ModelError if name == "/" else UnknownNameError
    with pytest.raises(kind) as error:
        find_config(name)
    assert "\n" not in str(error.value)


def test_sizes_that_are_none_or_make_none():
    with pytest.raises(SettingError, match=r"llama has no size 'hidden'; sizes are: .*hidden_size"):
        find_config("llama", {"hidden": 3})
    with pytest.raises(ModelError, match="not a multiple"):
        make_model(find_config("llama", {"hidden_size": 65}))
    with pytest.raises(ModelError, match=r"no causal language model can be made of llama"):
        make_model(find_config("llama", {"hidden_size": -64}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be used"),
        ("{}", "names no model_type"),
        (json.dumps({"model_type": "nobody"}), "nobody"),
        (json.dumps({"model_type": "t5"}), "no causal language model can be made of t5"),
    ],
)
def test_configurations_that_cannot_be_read(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=message) as error:
        make_model(find_config(tmp_path))
    assert "\n" not in str(error.value)


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).parent.joinpath("ran").touch()
Path("{mark}").touch()
class Mine(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = Mine
"""


def test_code_runs_only_where_it_is_trusted(tmp_path, monkeypatch):
    folder, mark = tmp_path / "remote", tmp_path / "mark"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder.mkdir()
    (folder / "mine.py").write_text(CODE.replace("{mark}", mark.as_posix()))
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
    auto_map = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": auto_map, **settings}))
    with pytest.raises(ModelError, match=r"brings code of its own; .* trust_remote_code"):
        find_config(folder)
    assert not mark.exists()
    config = find_config(folder, {"num_hidden_layers": 3}, trust_remote_code=True)
    model = make_model(config, trust_remote_code=True)
    assert mark.exists() and len(model.model.layers) == 3


def test_a_name_of_the_hub_is_asked_for_its_configuration_alone(monkeypatch, tmp_path):
    asked: list[str] = []

    def get(name: str, **options: object) -> tuple[dict[str, object], dict[str, object]]:
        asked.append(name)
        return {"model_type": "llama", "num_hidden_layers": 1}, {}

    monkeypatch.setattr("transformers.PretrainedConfig.get_config_dict", get)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were asked for"))
    monkeypatch.chdir(tmp_path)
    assert len(make_model(find_config("owner/name")).model.layers) == 1
    assert asked == ["owner/name"] and not list(Path.cwd().iterdir())
