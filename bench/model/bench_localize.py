"""Localizing on 200 TOFU questions, against a plain loop of stock passes over them, and one with hooks.

By a criterion of activations the passes are forward alone, by one of their gradients backward too. The loop takes the
records as they come, eight at a time, padded to the longest, as a data loader does. All sides encode the text. Data:
forget05 and retain95 of TOFU (Maini et al. 2024, arXiv 2401.06121), 100 questions each.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import clue_fast
from bench import machine
from bench.files import DATA
from bench.interleaved import Case, Comparison, Target
from bench.model.bench_forward import Hooks, Shape
from clue_fast.data import Collator, Record, encode, padding_token
from clue_fast.demo.pretraining import train_tokenizer

TOFU = DATA / "tofu"
QUESTIONS, BATCH = 100, 8
SHAPES = [Shape(5, 128, 384, BATCH, 0), Shape(4, 256, 704, BATCH, 0)]
DTYPES = [torch.float32, torch.bfloat16]
CRITERIA = {"difference": False, "attribution": True}
"""Whether it needs the gradients of activations, for which the loops run backward too."""


def load() -> dict[str, list[Record]]:
    """The first questions of both sets; from the hub where they are not here."""
    sets = {"forget": "forget05", "retain": "retain95"}
    folder = TOFU.is_dir()
    return {
        name: clue_fast.load_records(TOFU / f"{subset}.json" if folder else f"locuslab/TOFU:{subset}", name)[:QUESTIONS]
        for name, subset in sets.items()
    }


def cases(shape: Shape, dtype: torch.dtype, criterion: str) -> dict[str, Case]:
    """Models with the same random weights; one with hooks, for activations alone, where the loops run forward only."""
    backward = CRITERIA[criterion]
    sets = load()
    records = sets["forget"] + sets["retain"]
    tokenizer = train_tokenizer(records, vocab_size=4096)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.units,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.width // 64,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config).to(machine.device(), dtype).eval()
    loops = {"plain loop": copy.deepcopy(model).requires_grad_(False)}
    if backward:
        embeddings = loops["plain loop"].get_input_embeddings()
        embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_())
    else:
        loops["loop with hooks"] = copy.deepcopy(model)
        Hooks(loops["loop with hooks"])
    collate = Collator(padding_token(tokenizer))

    def loop(model: nn.Module) -> None:
        examples = encode(records, tokenizer, None)
        names = ("input_ids", "attention_mask", *(["labels"] if backward else []))
        with torch.set_grad_enabled(backward):
            for first in range(0, len(examples), BATCH):
                batch = collate(examples[first : first + BATCH])
                found = model(**{name: batch[name].to(machine.device()) for name in names}, use_cache=False)
                if backward:
                    found.loss.backward()

    return {
        **{name: partial(loop, own) for name, own in loops.items()},
        "localize": lambda: clue_fast.localize(
            model,
            sets["forget"],
            sets["retain"],
            tokenizer=tokenizer,
            criterion=criterion,
            progress=False,
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def bench_localize(compare, shape: Shape, dtype: torch.dtype, criterion: str) -> None:
    title = f"200 TOFU questions, {shape.layers} layers x {shape.width}/{shape.units}, {str(dtype)[6:]}, by {criterion}"
    compare(Comparison(title, cases(shape, dtype, criterion), [Target("localize", "plain loop", 0.9)]))
