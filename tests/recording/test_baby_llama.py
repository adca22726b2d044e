"""Patching and conversion on real weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import clue_fast


def sample(model: LlamaForCausalLM, texts: int, tokens: int) -> torch.Tensor:
    """Text as the model writes it, [texts, tokens]."""
    torch.manual_seed(0)
    return model.generate(
        torch.full((texts, 1), 1),
        do_sample=True,
        max_new_tokens=tokens - 1,
        min_new_tokens=tokens - 1,
        top_k=0,
        pad_token_id=0,
    )


def llama2c_logits(path: Path, tokens: list[int]) -> np.ndarray:
    """A forward pass in float64 straight from the file: rotary embedding on neighboring pairs, one token at a time."""
    width, hidden, layers, heads, kv_heads, vocabulary, _ = np.fromfile(path, "<i4", 7).tolist()
    head = width // heads
    raw = np.fromfile(path, "<f4", offset=28).astype(np.float64)
    position = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        size = int(np.prod(shape))
        position += size
        return raw[position - size : position].reshape(shape)

    embedding, norm1 = take(vocabulary, width), take(layers, width)
    wq, wk, wv = (
        take(layers, width, width),
        take(layers, kv_heads * head, width),
        take(layers, kv_heads * head, width),
    )
    wo, norm2 = take(layers, width, width), take(layers, width)
    w1, w2, w3 = take(layers, hidden, width), take(layers, width, hidden), take(layers, hidden, width)
    norm3 = take(width)

    def normalize(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + 1e-5) * weight

    def rotate(vector: np.ndarray, step: int) -> np.ndarray:
        pairs = vector.reshape(-1, head // 2, 2)
        angle = step * 10000.0 ** (-np.arange(0, head, 2) / head)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
        return np.stack([turned.real, turned.imag], -1).reshape(-1, head)

    keys: list[list[np.ndarray]] = [[] for _ in range(layers)]
    values: list[list[np.ndarray]] = [[] for _ in range(layers)]
    logits = []
    for step, token in enumerate(tokens):
        x = embedding[token].copy()
        for layer in range(layers):
            y = normalize(x, norm1[layer])
            query = rotate(wq[layer] @ y, step)
            keys[layer].append(rotate(wk[layer] @ y, step))
            values[layer].append((wv[layer] @ y).reshape(-1, head))
            attended = []
            for number in range(heads):
                shared = number * kv_heads // heads
                scores = np.array([query[number] @ key[shared] for key in keys[layer]]) / np.sqrt(head)
                weights = np.exp(scores - scores.max())
                attended.append(sum(w * v[shared] for w, v in zip(weights / weights.sum(), values[layer], strict=True)))
            x += wo[layer] @ np.concatenate(attended)
            y = normalize(x, norm2[layer])
            gate = w1[layer] @ y
            x += w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ y))
        logits.append(embedding @ normalize(x, norm3))
    return np.stack(logits)


def test_conversion_computes_what_the_file_says(baby_llama: LlamaForCausalLM, data_dir: Path) -> None:
    tokens = sample(baby_llama, 1, 24)
    with torch.no_grad():
        logits = baby_llama(tokens).logits[0].double().numpy()
    expected = llama2c_logits(data_dir / "models" / "babyllama_tok105" / "model5000.bin", tokens[0].tolist())
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_loss_on_its_own_text_is_that_of_the_source(baby_llama: LlamaForCausalLM) -> None:
    """On text drawn from the model, the loss is its entropy: for a calibrated model, its loss on real text, .664."""
    tokens = sample(baby_llama, 32, 256)
    with torch.no_grad():
        loss = baby_llama(tokens, labels=tokens).loss.item()
    assert loss == pytest.approx(0.664, abs=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patched_logits_stay_within_twice_the_rounding_error(baby_llama: LlamaForCausalLM, dtype: torch.dtype) -> None:
    tokens = sample(baby_llama, 4, 64)
    with torch.no_grad():
        exact = baby_llama.double()(tokens).logits
        model = baby_llama.to(dtype)
        stock = model(tokens).logits
        patched = clue_fast.patch(model)
        with patched.record("forget"):
            fused = model(tokens).logits
        clue_fast.unpatch(model)
        restored = model(tokens).logits
    rounding = (stock.double() - exact).norm()
    assert (fused.double() - exact).norm() <= 2 * rounding
    assert (fused.double() - stock.double()).norm() <= 2 * rounding
    assert torch.equal(restored.view(torch.uint8), stock.view(torch.uint8))


@pytest.mark.parametrize("side", ["right", "left"])
def test_statistics_of_answers_are_of_the_positions_that_predict_them(baby_llama: LlamaForCausalLM, side: str) -> None:
    """A plain loop over records that are run alone: the token before each token of the answer counts."""
    texts = [text[:length] for text, length in zip(sample(baby_llama, 5, 40).tolist(), (40, 8, 23, 31, 7), strict=True)]
    prompts = (6, 7, 1, 30, 5)  # the second and the fourth have an answer of one token
    model = baby_llama.double()
    kept: dict[str, list[torch.Tensor]] = {}
    paths = [site.output for site in clue_fast.find_sites(model)]
    for text, prompt in zip(texts, prompts, strict=True):
        for path in paths:
            kept.setdefault(path, []).append(torch.empty(0))

        def keep(path: str, prompt: int = prompt):
            return lambda _, args: kept[path].__setitem__(-1, args[0][0, prompt - 1 : -1])

        handles = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in paths]
        with torch.no_grad():
            model(torch.tensor([text]))
        for handle in handles:
            handle.remove()
    rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for text, prompt in zip(texts, prompts, strict=True):
        answer = [-100] * prompt + text[prompt:]
        for name, values, fill in (
            ("input_ids", text, 0),
            ("attention_mask", [1] * len(text), 0),
            ("labels", answer, -100),
        ):
            padding = [fill] * (40 - len(text))
            rows[name].append(values + padding if side == "right" else padding + values)
    batch = {name: torch.tensor(row) for name, row in rows.items()}
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with clue_fast.patch(model) as patched, torch.no_grad():
        with patched.record("forget"):
            model(**batch)
        for site in patched.sites:
            found, expected = patched.statistics.of(site, "forget"), torch.cat(kept[site.output])
            assert found.count == len(expected) == 34 + 1 + 22 + 1 + 2
            torch.testing.assert_close(found.mean, expected.mean(0), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(found.max_abs, expected.abs().amax(0), rtol=1e-9, atol=1e-12)


def test_statistics_equal_those_of_hooks(baby_llama: LlamaForCausalLM) -> None:
    tokens = sample(baby_llama, 4, 64)
    mask = torch.ones_like(tokens)
    mask[0, 40:] = 0
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].double()))
        for name, module in baby_llama.named_modules()
        if name.endswith("down_proj")
    ]
    with torch.no_grad():
        baby_llama(tokens, attention_mask=mask)
    for handle in handles:
        handle.remove()
    with clue_fast.patch(baby_llama) as patched, torch.no_grad():
        with patched.record("forget"):
            baby_llama(tokens, attention_mask=mask)
        for site in patched.sites:
            found, activation = patched.statistics.of(site, "forget"), seen[site.output][mask.bool()]
            assert found.count == int(mask.sum())
            for name, expected in {
                "mean": activation.mean(0),
                "variance": activation.var(0, correction=0),
                "abs_mean": activation.abs().mean(0),
                "max_abs": activation.abs().amax(0),
                "active_fraction": (activation > 0).double().mean(0),
            }.items():
                torch.testing.assert_close(
                    getattr(found, name), expected, rtol=1e-4, atol=2e-6, msg=f"{site.path} {name}"
                )
