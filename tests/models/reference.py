"""What recording has to give, from the definition: hooks on the stock model that keep everything in float64."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from tests.models.families import FAMILIES, MASKED, SEQ2SEQ


@dataclass
class Seen:
    """What one family of units did: a list over its calls of [tokens, units], and which tokens those were."""

    activations: list[Tensor] = field(default_factory=list)
    products: dict[int, Tensor] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)

    def add(self, h: Tensor, heads: int | None = None, token: Tensor | None = None) -> None:
        """Keeps h [..., channels], and in backward its product with its gradient.

        Args:
            h: activations.
            heads: units are so many equal stretches of channels: their norm, and the sum of the products.
            token: [tokens], the tokens that these are, default all.
        """
        value, call = h.detach().double().flatten(0, -2), len(self.activations)
        self.activations.append(value.unflatten(-1, (heads, -1)).square().sum(-1).sqrt() if heads else value)
        self.tokens.append(torch.arange(len(value)) if token is None else token)

        def keep(gradient: Tensor) -> None:
            product = value * gradient.double().flatten(0, -2)
            self.products[call] = product.unflatten(-1, (heads, -1)).sum(-1) if heads else product

        if h.requires_grad:
            h.register_hook(keep)

    def counted(self, counts: Tensor) -> tuple[Tensor, Tensor | None]:
        """Activations and products of the tokens that count [tokens] bool."""
        keep = counts[torch.cat(self.tokens)]
        products = torch.cat([self.products[call] for call in sorted(self.products)]) if self.products else None
        return torch.cat(self.activations)[keep], None if products is None else products[keep]


def gated_expert(experts: nn.Module, x: Tensor, index: int) -> Tensor:
    """Activations of one expert: Mixtral, Qwen, OLMoE and DeepSeek stack [gate; up]."""
    gate, up = (x @ experts.gate_up_proj[index].T).chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def gpt_oss_expert(experts: nn.Module, x: Tensor, index: int) -> Tensor:
    """Activations of one expert of gpt-oss: gate and up interleaved, clamped, with a bias (model card, section 2)."""
    both = x @ experts.gate_up_proj[index] + experts.gate_up_proj_bias[index]
    gate, up = both[..., 0::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _define_experts(experts: nn.Module, seen: dict[str, Seen], path: str, gpt_oss: bool) -> None:
    """Gives a stack of experts the forward that defines it, which keeps the activations of each."""

    def forward(hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden)
        for index in range(len(experts.down_proj)):
            token, place = torch.where(chosen == index)
            h = (gpt_oss_expert if gpt_oss else gated_expert)(experts, hidden[token], index)
            seen.setdefault(f"{path}[{index}]", Seen()).add(h, token=token)
            y = (
                h @ experts.down_proj[index] + experts.down_proj_bias[index]
                if gpt_oss
                else h @ experts.down_proj[index].T
            )
            out = out.index_add(0, token, y * weights[token, place, None])
        return out

    experts.forward = forward


@contextmanager
def watching(model: nn.Module, name: str, heads: bool = False) -> Iterator[dict[str, Seen]]:
    """Keeps the activations of every site of a stock model, by the name of the site, while it lasts."""
    family = FAMILIES[name]
    seen: dict[str, Seen] = {}
    handles = []

    def watch(path: str, units: dict[str, int | None]) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for site, count in units.items():
                seen.setdefault(site, Seen()).add(inputs[0], count)

        handles.append(model.get_submodule(path).register_forward_pre_hook(hook))

    for path, module in model.named_modules():
        if heads and re.search(f"(^|\\.|[a-z]){family.heads}$", path):
            owner, count = path.rpartition(".")[0], 4
            if family.task == "MaskedLM":
                owner = owner.replace("output", "self")
            units: dict[str, int | None] = {f"{owner}:attention_head": count}
            if family.sharing > 1 and "vision" not in path:
                units = {
                    f"{owner}:attention_query": count,
                    f"{owner}:attention_key_value": count // family.sharing,
                }
            watch(path, units)
        elif not heads and family.mlp and re.search(f"(^|\\.){family.mlp}$", path):
            watch(path, {path: None})
        elif not heads and path.endswith(".experts"):
            _define_experts(module, seen, path, name == "gpt_oss")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            module.__dict__.pop("forward", None)


def counts(name: str, path: str, batch: dict[str, Tensor], tokens: int) -> Tensor:
    """Which of the tokens that a site sees count when a batch with labels is recorded, [tokens] bool.

    Those that predict an answer: the token before it in a causal model, the one in its place in others.
    """
    task = FAMILIES[name].task
    if "vision" in path or "visual" in path:
        return torch.ones(tokens, dtype=torch.bool)
    if task == SEQ2SEQ and path.startswith("encoder"):
        return batch["attention_mask"].bool().flatten()
    counted = torch.zeros_like(batch["labels"], dtype=torch.bool)
    before = 0 if task in (SEQ2SEQ, MASKED) else 1
    for row, labels in enumerate(batch["labels"].tolist()):
        for place, label in enumerate(labels):
            attended = task == SEQ2SEQ or bool(batch["attention_mask"][row, place - before])
            if label != -100 and place >= before and attended:
                counted[row, place - before] = True
    return counted.flatten()


def statistics_of(activations: Tensor, products: Tensor | None) -> dict[str, Tensor]:
    """Every statistic of [tokens, units], by its name in ``UnitStatistics``."""
    found = {
        "mean": activations.mean(0),
        "variance": activations.var(0, correction=0),
        "abs_mean": activations.abs().mean(0),
        "max_abs": activations.abs().amax(0),
        "active_fraction": (activations > 0).double().mean(0),
    }
    if products is not None:
        found["attribution"] = products.mean(0)
        found["abs_attribution"] = products.abs().mean(0)
        found["square_attribution"] = products.square().mean(0)
    return found
