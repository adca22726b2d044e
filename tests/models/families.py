"""Every family that is tested: a tiny model with random weights, and a batch for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

VOCABULARY, IMAGE = 96, 90
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
PER_LAYER_INPUTS: dict[str, Any] = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CAUSAL, MASKED, SEQ2SEQ, IMAGES = "CausalLM", "MaskedLM", "Seq2SeqLM", "ImageTextToText"


@dataclass(frozen=True)
class Family:
    """One family: its configuration, and what is expected of it.

    Attributes:
        config: name of its configuration class.
        settings: given to that.
        mlp: how the paths of the projections end that read the channels of its dense MLPs, or "".
        heads: the same for those that read its attention heads.
        structures: what its MLPs are found to be.
        sharing: query heads to one key/value head.
        task: of the auto class that makes the model.
        strict: whether all that is gated can be fused.
    """

    config: str
    settings: Mapping[str, Any]
    mlp: str
    heads: str
    structures: frozenset[str]
    sharing: int = 1
    task: str = CAUSAL
    strict: bool = True


def _family(
    config: str,
    mlp: str,
    heads: str,
    structures: str,
    sharing: int = 1,
    task: str = CAUSAL,
    *,
    strict: bool = True,
    **settings: Any,
) -> Family:
    return Family(config, settings, mlp, heads, frozenset(structures.split()), sharing, task, strict)


FAMILIES: dict[str, Family] = {
    "llama": _family("LlamaConfig", "mlp.down_proj", "o_proj", "gated", 2, **SIZES),
    "mistral": _family("MistralConfig", "mlp.down_proj", "o_proj", "gated", 2, **SIZES),
    "qwen2": _family("Qwen2Config", "mlp.down_proj", "o_proj", "gated", 2, **SIZES),
    "qwen3": _family("Qwen3Config", "mlp.down_proj", "o_proj", "gated", 2, **SIZES, head_dim=8),
    "gemma2": _family("Gemma2Config", "mlp.down_proj", "o_proj", "gated", 2, **SIZES, head_dim=8),
    "gemma3": _family("Gemma3TextConfig", "mlp.down_proj", "o_proj", "gated", 2, **SIZES, head_dim=8),
    "gemma3n": _family(
        "Gemma3nTextConfig",
        r"mlp.down_proj",
        "o_proj",
        "gated",
        2,
        **SIZES,
        **PER_LAYER_INPUTS,
        strict=False,
        head_dim=8,
        laurel_rank=4,
        altup_num_inputs=2,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.75, 0.0],  # of the first layers of the released models
    ),
    "gemma4": _family(
        "Gemma4TextConfig",
        "mlp.down_proj",
        "o_proj",
        "gated",
        2,
        **SIZES,
        **PER_LAYER_INPUTS,
        head_dim=8,
        global_head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": _family("Phi3Config", "mlp.down_proj", "o_proj", "packed", 2, **SIZES),
    "glm4": _family("Glm4Config", "mlp.down_proj", "o_proj", "packed", 2, **SIZES, head_dim=8),
    "olmo2": _family("Olmo2Config", "mlp.down_proj", "o_proj", "gated", 2, **SIZES),
    "smollm3": _family("SmolLM3Config", "mlp.down_proj", "o_proj", "gated", 2, **SIZES),
    "gpt2": _family("GPT2Config", "mlp.c_proj", "attn.c_proj", "plain", **GPT2_SIZES),
    "gpt_neox": _family("GPTNeoXConfig", "mlp.dense_4h_to_h", "attention.dense", "plain", **SIZES),
    "gptj": _family("GPTJConfig", "mlp.fc_out", "attn.out_proj", "plain", **GPT2_SIZES, rotary_dim=4),
    "opt": _family("OPTConfig", "fc2", "out_proj", "plain", **SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "opt projected": _family(
        "OPTConfig",
        "fc2",
        "out_proj",
        "plain",
        **SIZES,
        ffn_dim=48,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
    ),
    "falcon": _family(
        "FalconConfig", "mlp.dense_4h_to_h", "self_attention.dense", "plain", 4, **SIZES, ffn_hidden_size=48
    ),
    "falcon grouped": _family(
        "FalconConfig",
        "mlp.dense_4h_to_h",
        "self_attention.dense",
        "plain",
        2,
        **SIZES,
        ffn_hidden_size=48,
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "falcon_h1": _family(
        "FalconH1Config",
        "feed_forward.down_proj",
        "o_proj",
        "gated",
        2,
        **SIZES,
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_chunk_size=16,
        mlp_multipliers=[0.88, 0.35],
        key_multiplier=0.3,
        attention_in_multiplier=0.5,
        attention_out_multiplier=0.7,
    ),
    "bloom": _family("BloomConfig", "mlp.dense_4h_to_h", "self_attention.dense", "plain", **SIZES, n_layer=2, n_head=4),
    "bert": _family("BertConfig", r"\d.output.dense", "attention.output.dense", "plain", task=MASKED, **SIZES),
    "roberta": _family("RobertaConfig", r"\d.output.dense", "attention.output.dense", "plain", task=MASKED, **SIZES),
    "t5": _family("T5Config", "wo", "Attention.o", "plain", task=SEQ2SEQ, **T5_SIZES),
    "t5 gated": _family(
        "T5Config", "wo", "Attention.o", "gated", task=SEQ2SEQ, **T5_SIZES, feed_forward_proj="gated-gelu"
    ),
    "mixtral": _family("MixtralConfig", "", "o_proj", "experts", 2, **SIZES, num_local_experts=4),
    "qwen2_moe": _family(
        "Qwen2MoeConfig",
        "shared_expert.down_proj",
        "o_proj",
        "experts gated",
        2,
        **SIZES,
        **EXPERTS,
        shared_expert_intermediate_size=40,
    ),
    "qwen3_moe": _family("Qwen3MoeConfig", "", "o_proj", "experts", 2, **SIZES, **EXPERTS, head_dim=8),
    "olmoe": _family("OlmoeConfig", "", "o_proj", "experts", 2, **SIZES, num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": _family(
        "DeepseekV3Config",
        r"(shared_experts|layers.0.mlp).down_proj",
        "o_proj",
        "experts gated",
        **SIZES | {"num_key_value_heads": 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=12,
    ),
    "gpt_oss": _family(
        "GptOssConfig", "", "o_proj", "experts", 2, **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=8
    ),
    "llava": _family(
        "LlavaConfig",
        r"mlp.(fc2|down_proj)",
        "(out|o)_proj",
        "gated plain",
        2,
        IMAGES,
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
        },
        text_config=SIZES | {"model_type": "llama"},
        image_token_id=IMAGE,
    ),
    "qwen2_vl": _family(
        "Qwen2VLConfig",
        r"mlp.(fc2|down_proj)",
        "language_model.*o_proj",
        "gated plain",
        2,
        IMAGES,
        vision_config={
            "depth": 2,
            "embed_dim": 48,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=SIZES | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=IMAGE,
        video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2,
        vision_end_token_id=IMAGE + 3,
    ),
}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Returns the model of a family with random weights, without dropout, in evaluation mode."""
    family = FAMILIES[name]
    if not hasattr(transformers, family.config):
        pytest.skip("not in this transformers")
    config = getattr(transformers, family.config)(**family.settings)
    for key in vars(config):
        if key.endswith(("dropout", "dropout_rate", "_pdrop", "dropout_prob")):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = getattr(transformers, f"AutoModelFor{family.task}").from_config(config)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.02 * torch.randn_like(parameter)).to(dtype)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the faster ones know no float64
    return model.eval()


def make_batch(name: str, rows: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Returns a batch: the first row is padded at its end, the second has a prompt that is no answer."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.task == IMAGES:
        ids[:, 1:5] = IMAGE
        batch |= _images(name, ids, generator)
    mask[0, tokens - 2 :] = 0
    if family.task == SEQ2SEQ:
        labels = torch.randint(3, IMAGE, (rows, 5), generator=generator)
        labels[0, 3:] = -100
    else:
        labels = torch.where(mask == 1, ids, -100)
        labels[1, :2] = -100
        labels[ids == IMAGE] = -100
    return batch | {"labels": labels}


def _images(name: str, ids: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """One image a row, of four image tokens."""
    rows = len(ids)
    if name == "llava":
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator)}
    grid = torch.tensor([[1, 4, 4]] * rows)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
