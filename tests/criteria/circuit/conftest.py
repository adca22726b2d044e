"""Small models of several families, and one that has learned indirect objects."""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.falcon import FalconConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.mixtral import MixtralConfig
from transformers.models.olmo2 import Olmo2Config
from transformers.models.opt import OPTConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen3 import Qwen3Config

from clue_fast.criteria.circuit import CorruptedExample

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "grouped": LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=4),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
    "opt": OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, activation_function="gelu"),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "falcon": FalconConfig(**FALCON),
    "falcon_grouped": FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True, bias=True),
    "gemma2": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "olmo2": Olmo2Config(**SIZES, num_key_value_heads=2),
}
SCALED = GraniteConfig(**SIZES, residual_multiplier=0.5)


@pytest.fixture
def family() -> Callable[[str], PreTrainedModel]:
    """Makes a random model of a family, with no weight at its initial 0 or 1."""

    def make(name: str) -> PreTrainedModel:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIGS.get(name, SCALED)).eval()
        if name == "mixtral":
            model.set_experts_implementation("eager")  # the only one that runs in float64
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        return model.requires_grad_(False)

    return make


@dataclass(frozen=True)
class IndirectObjects:
    """A Llama of three layers that says who is given something, and prompts with corrupted counterparts."""

    model: LlamaForCausalLM
    pairs: list[CorruptedExample]
    accuracy: float


@pytest.fixture(scope="session")
def indirect_objects(data_dir: Path) -> IndirectObjects:
    """Trained on the prompts of the data set with names of all of them, in under half a minute."""
    prompts, names = read_prompts(data_dir / "circuits" / "ioi_llama.csv")
    vocabulary = {word: index for index, word in enumerate(sorted({w for p, _ in prompts for w in p} | set(names)), 1)}
    rng = random.Random(0)

    def draw() -> CorruptedExample:
        prompt, (subject, other) = rng.choice(prompts)
        first, second, third = rng.sample(names, 3)
        clean = [{subject: first, other: second}.get(word, word) for word in prompt]
        corrupted = list(clean)
        corrupted[max(i for i, word in enumerate(prompt) if word == subject)] = third
        ids = [[vocabulary[word] for word in words] for words in (clean, corrupted)]
        answer = vocabulary[second]
        return CorruptedExample(ids[0] + [answer], ids[1] + [answer], [-100] * len(clean) + [answer])

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + 1,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    accuracy = 0.0
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, step / 30) * (1 - step / 550)
        logits, answers = last_logits(model, [draw() for _ in range(64)])
        loss = torch.nn.functional.cross_entropy(logits, answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        accuracy = float((logits.argmax(-1) == answers).float().mean())
    return IndirectObjects(model.eval().requires_grad_(False), [draw() for _ in range(8)], accuracy)


def last_logits(model: LlamaForCausalLM, pairs: list[CorruptedExample]) -> tuple[Tensor, Tensor]:
    """Logits of the answers of clean prompts, and the answers."""
    ends = torch.tensor([len(pair.input_ids) - 2 for pair in pairs])
    ids = torch.zeros(len(pairs), int(ends.max()) + 1, dtype=torch.long)
    for row, pair in zip(ids, pairs, strict=True):
        row[: len(pair.input_ids) - 1] = torch.tensor(pair.input_ids[:-1])
    return model(ids).logits[torch.arange(len(pairs)), ends], torch.tensor([pair.input_ids[-1] for pair in pairs])


def read_prompts(path: Path) -> tuple[list[tuple[list[str], tuple[str, str]]], list[str]]:
    """Prompts as words with their subject and indirect object, and all names."""
    found, names = [], set()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            clean, corrupted = (re.findall(r"\w+|[^\w\s]", row[name]) for name in ("clean", "corrupted"))
            changed = [a for a, b in zip(clean, corrupted, strict=True) if a != b]
            names |= set(changed)
            found.append((clean, changed))
    prompts = []
    for clean, changed in found:
        others = [word for word in clean if word in names and word not in changed]
        if len(changed) == 1 and len(others) == 1 and clean.count(changed[0]) == 2:
            prompts.append((clean, (changed[0], others[0])))
    return prompts, sorted(names)
