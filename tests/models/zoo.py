"""Tiny models with random weights of every causal language model that the installed transformers can build.

A configuration is the default one of its family with every size that has a known name cut down, and one layer of
every kind that the default has.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCABULARY = 96
_NAMES: dict[int, str] = {
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
    64: "max_position_embeddings n_positions n_ctx context_length max_seq_len model_max_length max_target_positions "
    "max_source_positions num_mel_bins",
    32: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim embedding_size input_embedding_size lru_width "
    "output_embedding_size decoder_hidden_size pronunciation_embed_dim shape_embed_dim ple_embed_dim "
    "word_embed_proj_dim mamba_d_ssm",
    48: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner ffn_hidden_size feed_forward_size dff "
    "dim_ff d_inner intermediate_size_mlp dense_intermediate_size",
    40: "shared_expert_intermediate_size shared_experts_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size",
    24: "moe_intermediate_size expert_ffn_hidden_size",
    16: "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank loop_gate_rank adapter_rank router_hidden_size "
    "hc_lowrank chunk_size mamba_chunk_size max_inference_chunksize",
    8: "head_dim attention_head_dim d_head dim_head swa_head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim "
    "linear_key_head_dim linear_value_head_dim index_head_dim linear_head_dim kv_channels hidden_size_per_layer_input "
    "laurel_rank state_size mamba_d_state ssm_state_size mamba_d_head mamba_head_dim mamba_headdim global_head_dim",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads zero_expert_num "
    "rotary_dim mamba_n_heads mamba_num_heads n_mamba_heads num_attention_heads_per_layer",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers encoder_layers "
    "num_encoder_layers num_blocks num_layers_per_stack n_input_layers n_recurrent_layers n_output_layers "
    "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_k linear_num_key_heads altup_num_inputs hc_mult hc_count",
    1: "n_group topk_group num_expert_group o_groups mamba_n_groups n_groups mamba_ngroups first_k_dense_replace "
    "num_dense_layers num_kv_shared_layers",
}
SMALL = {name: value for value, names in _NAMES.items() for name in names.split()} | {"num_kv_shared_layers": 0}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1}
OTHER: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "dory": {"num_hidden_layers": 6, "layer_types": None},
    "dots1": {"layer_types": None},
    "falcon_h1": {"mlp_multipliers": [0.88, 0.35], "key_multiplier": 0.3},
    "gemma3n_text": {"intermediate_size": 48, "vocab_size_per_layer_input": 96},
    "granitemoehybrid": {"mamba_n_heads": 8, "layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "opt": {"word_embed_proj_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "roc_bert": {"concat_input": False},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16]},
    "whisper": {"num_mel_bins": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(kind: str) -> Any:
    """Returns the configuration of a tiny model. Raises whatever its class does, or NotImplementedError."""
    config_class = CONFIG_MAPPING[kind]
    default = config_class()
    parts = [name for name in config_class.sub_configs if name not in ("attn_config", "ffn_config")]
    if parts:
        raise NotImplementedError(f"is made of {', '.join(parts)}")
    own = default.to_dict()
    small = {key: SMALL[key] for key, value in own.items() if key in SMALL and (value is not None or key == "head_dim")}
    small = {key: value for key, value in small.items() if not isinstance(own[key], list | dict)}
    small |= {key: TOKENS.get(key, 2) for key in own if key.endswith("_token_id")}
    if "kv_lora_rank" in own:  # latent attention has no key/value heads of its own
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    layers = next((own[name] for name in LAYERS if isinstance(own.get(name), int)), 0)
    lists = {key: value for key, value in own.items() if isinstance(value, list) and len(value) == layers > 2}
    if lists:
        kinds = [str(of_layer) for of_layer in zip(*lists.values(), strict=True)]
        places = [kinds.index(of_layer) for of_layer in dict.fromkeys(kinds)]
        places = (places * 2)[: max(2, len(places))]
        small |= {key: [value[place] for place in places] for key, value in lists.items()}
        small |= {key: len(places) for key in LAYERS if key in small}
    return config_class(**small | OTHER.get(kind, {}))


def make_tiny(kind: str) -> Any:
    """Returns a model in evaluation mode. Raises whatever its class does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrunk(kind))
    if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
        raise NotImplementedError("is not tiny")
    return model.eval()
