"""Converts a model in the legacy float32 format of llama2.c into a Hugging Face checkpoint.

    python examples/convert_llama2c.py model.bin output_folder [--tokenizer tokenizer.model]

The format: seven int32 (width, hidden width, layers, heads, key/value heads, vocabulary, context), then float32
weights, each kind for all layers together. Query and key rows lie in pairs for the rotary embedding; Hugging Face
wants the first halves of all pairs before the second halves.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HEADER = ("width", "hidden", "layers", "heads", "kv_heads", "vocabulary", "context")


def read_llama2c(path: str | os.PathLike[str]) -> LlamaForCausalLM:
    """Returns the model in a llama2.c file, in float32.

    Raises:
        ValueError: the file does not have the length that its header asks for.
    """
    path = Path(path)
    header = dict(zip(HEADER, np.fromfile(path, dtype="<i4", count=len(HEADER)).tolist(), strict=True))
    shared_classifier = header["vocabulary"] > 0
    width, hidden, layers, heads = header["width"], header["hidden"], header["layers"], header["heads"]
    head_width = width // heads
    kv_width = head_width * header["kv_heads"]
    vocabulary = abs(header["vocabulary"])
    shapes = {
        "embed_tokens": (vocabulary, width),
        "input_layernorm": (layers, width),
        "q_proj": (layers, width, width),
        "k_proj": (layers, kv_width, width),
        "v_proj": (layers, kv_width, width),
        "o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "gate_proj": (layers, hidden, width),
        "down_proj": (layers, width, hidden),
        "up_proj": (layers, hidden, width),
        "norm": (width,),
        "rotary": (2, header["context"], head_width // 2),
    }
    if not shared_classifier:
        shapes["lm_head"] = (vocabulary, width)
    values = torch.from_numpy(np.fromfile(path, dtype="<f4", offset=4 * len(HEADER)))
    expected = sum(int(np.prod(shape)) for shape in shapes.values())
    if values.numel() != expected:
        raise ValueError(f"{path} holds {values.numel()} weights, its header asks for {expected}")
    parts = dict(zip(shapes, values.split([int(np.prod(shape)) for shape in shapes.values()]), strict=True))
    weights = {name: parts[name].reshape(shape) for name, shape in shapes.items()}

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=header["kv_heads"],
        max_position_embeddings=header["context"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=shared_classifier,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": weights["embed_tokens"], "model.norm.weight": weights["norm"]}
    state["lm_head.weight"] = weights["embed_tokens" if shared_classifier else "lm_head"]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"{prefix}.{name}.weight"] = weights[name][layer]
        for name in ("gate_proj", "up_proj", "down_proj"):
            state[f"{prefix}.mlp.{name}.weight"] = weights[name][layer]
        for name in ("v_proj", "o_proj"):
            state[f"{prefix}.self_attn.{name}.weight"] = weights[name][layer]
        state[f"{prefix}.self_attn.q_proj.weight"] = _half_rotary(weights["q_proj"][layer], heads)
        state[f"{prefix}.self_attn.k_proj.weight"] = _half_rotary(weights["k_proj"][layer], header["kv_heads"])
    model.load_state_dict(state)
    return model.eval()


def _half_rotary(weight: Tensor, heads: int) -> Tensor:
    """Reorders the rows of each head from pairs to halves; weight is [heads * head width, width]."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the llama2.c file")
    parser.add_argument("output", help="folder for the checkpoint")
    parser.add_argument("--tokenizer", help="a sentencepiece model, to be saved beside it")
    options = parser.parse_args()
    model = read_llama2c(options.model)
    model.save_pretrained(options.output)
    if options.tokenizer:
        from transformers import LlamaTokenizer

        LlamaTokenizer(vocab_file=options.tokenizer).save_pretrained(options.output)
    print(f"{sum(p.numel() for p in model.parameters())} weights written to {options.output}")


if __name__ == "__main__":
    main()
