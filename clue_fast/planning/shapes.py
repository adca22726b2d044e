"""Which model is planned: a configuration by a name, and the model it describes, without any weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clue_fast.errors import ClueFastError, ModelError, SettingError, UnknownNameError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LLAMA3 = {"vocab_size": 128256, "num_key_value_heads": 8}
_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "tie_word_embeddings": False}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
    ),
    "llama3-1b": (
        "llama",
        {
            **_LLAMA3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "tie_word_embeddings": True,
        },
    ),
    "llama3-3b": (
        "llama",
        {
            **_LLAMA3,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "tie_word_embeddings": True,
        },
    ),
    "llama3-8b": (
        "llama",
        {
            **_LLAMA3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
    ),
    "qwen3-14b": (
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 5120,
            "intermediate_size": 17408,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "qwen3-32b": (
        "qwen3",
        {
            **_QWEN3,
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
        },
    ),
    "llama3-70b": (
        "llama",
        {
            **_LLAMA3,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
        },
    ),
    "mixtral-8x7b": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
    ),
}
"""By name: the kind of model in transformers, and sizes as its authors have published them in its configuration."""


def find_config(
    name: str | os.PathLike[str], sizes: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Returns the configuration of a model; of a model of the hub nothing else is fetched.

    Args:
        name: a folder with a ``config.json``, a name of ``SHAPES``, a kind of model in transformers such as "llama",
            or "owner/name" on the hub, in this order.
        sizes: take the place of those of the configuration.
        trust_remote_code: run code that comes with it.

    Raises:
        UnknownNameError: there is no such architecture.
        ModelError: the configuration cannot be read.
        SettingError: it has no such size.
    """
    name, sizes = os.fspath(name), sizes or {}
    try:
        given = _given(name)
        if "auto_map" in given:
            return _remote(name, sizes, trust_remote_code)
        _check_sizes(name, _made(given), sizes)
        return _made({**given, **sizes})
    except ClueFastError:
        raise
    except Exception as error:  # whatever the hub, the file or a configuration raises
        raise ModelError(f"the configuration of {name} cannot be used: {_reason(error)}") from error


def _given(name: str) -> dict[str, Any]:
    """What a configuration says, with "model_type"."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name and Path(name).is_dir():
        return PretrainedConfig.get_config_dict(name, local_files_only=True)[0]
    kind, published = SHAPES.get(name, (name, {}))
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return {"model_type": kind, **published, "dtype": "bfloat16"}
    if name.count("/") == 1 and all(name.split("/")) and not name.startswith("."):
        return PretrainedConfig.get_config_dict(name)[0]
    choices = (*SHAPES, "a folder with a config.json", "owner/name on the hub", "a model_type of transformers")
    raise UnknownNameError("architecture", name, choices)


def _made(given: Mapping[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    if "model_type" not in given:
        raise ModelError("its config.json names no model_type")
    return AutoConfig.for_model(**given)


def _remote(name: str, sizes: Mapping[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    """A configuration of code that comes with it, which runs if it is trusted, and otherwise raises."""
    from transformers import AutoConfig

    if not trust_remote_code:
        raise ModelError(f"{name} brings code of its own; read it, and trust it with trust_remote_code, or leave it")
    config: PretrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=True)
    _check_sizes(name, config, sizes)
    for size, value in sizes.items():
        setattr(config, size, value)
    return config


def _check_sizes(name: str, config: PretrainedConfig, sizes: Mapping[str, Any]) -> None:
    known = {key for key, own in config.to_dict().items() if own is None or isinstance(own, int)}
    for size in sizes:
        if size not in known:
            having = sorted(key for key in known if getattr(config, key) is not None)
            raise SettingError(f"{name} has no size {size!r}; sizes are: {', '.join(having)}")


def make_model(config: PretrainedConfig, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """Makes the causal language model of a configuration on the meta device: it has shapes and no weights.

    Raises:
        ModelError: there is no such model, or it cannot be made with these sizes.
    """
    from transformers import AutoModelForCausalLM

    found = config.dtype if dtype == "auto" else getattr(torch, dtype)
    found = getattr(torch, found) if isinstance(found, str) else found
    try:
        with torch.device("meta"):
            auto: Any = AutoModelForCausalLM
            model: PreTrainedModel = auto.from_config(
                config, dtype=found or torch.float32, trust_remote_code=trust_remote_code
            )
            model.train()
            return model
    except Exception as error:  # whatever a model raises of sizes that do not go together
        raise ModelError(f"no causal language model can be made of {config.model_type}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
