"""Queries, keys, values and outputs of heads as units of their own: found, recorded and trained, each its slice alone.

Where they lie is written here from the definition of each family: 4 heads of 8 channels, 2 key/value heads where heads
share them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clue_fast
from clue_fast.errors import SparseError, UnknownNameError
from clue_fast.selection import CONFLICT, FORGET, Selection
from clue_fast.sites import Site, find_sites, model_fingerprint
from clue_fast.sparse import SparseAdamW, snapshot, sparsify
from tests.models.families import make_batch, make_model

ROLES = ("query", "key", "value", "output")
KINDS = tuple(f"projection_{role}" for role in ROLES)

Slices = dict[str, tuple[str, list[list[int]]]]


def stretch(start: int, size: int = 8) -> list[int]:
    return list(range(start, start + size))


def separate(key_value_heads: int, q: str, k: str, v: str) -> Slices:
    """A projection each, head after head."""
    heads, shared = ([stretch(8 * head) for head in range(count)] for count in (4, key_value_heads))
    return {"query": (q, heads), "key": (k, shared), "value": (v, shared)}


def packed(path: str, query: list[int], key: list[int], value: list[int]) -> Slices:
    """One projection, where each unit begins."""
    begins = {"query": query, "key": key, "value": value}
    return {role: (path, [stretch(start) for start in starts]) for role, starts in begins.items()}


QKV = ("q_proj", "k_proj", "v_proj")
LAYOUTS: dict[str, tuple[Slices, str]] = {
    "llama": (separate(2, *QKV), "o_proj"),
    "qwen3": (separate(2, *QKV), "o_proj"),
    "gpt_oss": (separate(2, *QKV), "o_proj"),
    "opt": (separate(4, *QKV), "out_proj"),
    "t5": (separate(4, "q", "k", "v"), "o"),
    "bert": (separate(4, "query", "key", "value"), "dense"),
    # GPT-2: [all queries, all keys, all values].
    "gpt2": (packed("c_attn", [0, 8, 16, 24], [32, 40, 48, 56], [64, 72, 80, 88]), "c_proj"),
    # Phi-3: the same, with fewer keys and values.
    "phi3": (packed("qkv_proj", [0, 8, 16, 24], [32, 40], [48, 56]), "o_proj"),
    # GPT-NeoX: [query, key, value] head after head.
    "gpt_neox": (packed("query_key_value", [0, 24, 48, 72], [8, 32, 56, 80], [16, 40, 64, 88]), "dense"),
    # Falcon: [the queries of a group, its key, its value] group after group; or one group of all.
    "falcon grouped": (packed("query_key_value", [0, 8, 32, 40], [16, 48], [24, 56]), "dense"),
    "falcon": (packed("query_key_value", [0, 8, 16, 24], [32], [40]), "dense"),
    # DeepSeek: keys without positions and values head after head, 8 and 12 channels; queries of 12.
    "deepseek_v3": (
        {
            "query": ("q_b_proj", [stretch(12 * head, 12) for head in range(4)]),
            "key": ("kv_b_proj", [stretch(20 * head, 8) for head in range(4)]),
            "value": ("kv_b_proj", [stretch(20 * head + 8, 12) for head in range(4)]),
        },
        "o_proj",
    ),
}
QUICK = ("llama", "gpt2", "phi3", "gpt_neox", "falcon grouped")
ALL = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]


def owned(model: Any, name: str, role: str, units: list[int]) -> dict[str, Tensor]:
    """By the end of its path, which numbers of a parameter units own, bool; from the definition."""
    slices, output = LAYOUTS[name]
    transposed = name == "gpt2"
    masks: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters():
        module, _, kind = path.rpartition(".")
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        rows = mask.T if transposed and mask.dim() == 2 else mask
        attention = any(word in path.lower() for word in ("attn", "attention"))
        if role == "output" and attention and module.endswith(f".{output}") and kind == "weight":
            size = rows.shape[1] // 4
            for unit in units:
                rows[:, unit * size : (unit + 1) * size] = True
        elif role != "output" and attention and module.endswith(f".{slices[role][0]}"):
            for unit in units:
                rows[slices[role][1][unit]] = True
        if mask.any():
            masks[path] = mask
    return masks


def select(model: Any, kind: str, units: list[int], category: int) -> Selection:
    sites = tuple(find_sites(model, (kind,)))
    categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
    for values in categories.values():
        values[units] = category
    scores = {site: torch.zeros(site.width) for site in sites}
    return Selection(sites, categories, scores, {}, model_fingerprint(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ALL)
def test_every_projection_of_a_head_is_found_where_it_lies(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    slices = LAYOUTS[name][0]
    sites = find_sites(model, ("projection",))
    assert [site.kind for site in sites] == list(KINDS) * (len(sites) // 4)
    for site in sites:
        role = site.kind.removeprefix("projection_")
        assert site.width == (4 if role == "output" else len(slices[role][1]))
        for unit in range(site.width):
            expected = owned(model, name, role, [unit])
            for part in site.slices:
                mask = torch.zeros_like(model.get_parameter(part.parameter), dtype=torch.bool)
                mask.index_fill_(part.dim, part.index(torch.tensor([unit])), True)
                assert torch.equal(mask, expected[part.parameter]), (site.name, unit)
            assert {part.parameter for part in site.slices} == {p for p in expected if p.startswith(module_of(site))}


def module_of(site: Any) -> str:
    return site.output if site.structure == "heads" else site.inputs[0]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ALL)
def test_a_unit_trains_its_slice_of_one_projection_and_nothing_else(name: str, role: str) -> None:
    """Bit by bit over all weights, with weight decay, after three steps."""
    model = make_model(name)
    shared = role in ("key", "value")
    units = [0, 2] if not shared or len(LAYOUTS[name][0][role][1]) == 4 else [0]
    before, allowed = snapshot(model), owned(model, name, role, units)
    sparsify(model, select(model, f"projection_{role}", units, CONFLICT))
    optimizer = SparseAdamW(model, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        model(**make_batch(name, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = 0
    for path, now in snapshot(model).items():
        changed = before[path].view(torch.int8) != now.view(torch.int8)
        changed = changed.reshape(*now.shape, -1).any(-1) if now.dim() else changed
        mask = allowed.get(path, torch.zeros_like(changed))
        assert not (changed & ~mask).any(), path
        moved += int((changed & mask).sum())
    assert moved >= 0.9 * sum(int(mask.sum()) for mask in allowed.values())


@pytest.mark.parametrize("name", ALL)
def test_forget_units_among_conflict_units_of_one_weight(name: str) -> None:
    """Queries may be forget units where the values in the same packed weight are conflict units; retain data reach
    the latter alone."""
    model = make_model(name)
    sites = tuple(find_sites(model, ("projection",)))
    category = {"projection_query": FORGET, "projection_value": CONFLICT}
    categories = {s: torch.full((s.width,), category.get(s.kind, 0), dtype=torch.int8) for s in sites}
    zeros = {site: torch.zeros(site.width) for site in sites}
    sparse = sparsify(model, Selection(sites, categories, zeros, {}, model_fingerprint(model)))
    batch = make_batch(name)
    sparse.set_batch_layout(0, len(batch["input_ids"]), batch["input_ids"].shape[1])
    model(**batch).loss.backward()
    found = {(part.category, part.values.grad is None) for part in sparse.slices if part.name == "weight"}
    assert found == {("forget", True), ("conflict", False)}


def test_keys_of_cross_attention_have_the_tokens_of_the_encoder() -> None:
    model, batch = make_model("t5"), make_batch("t5", tokens=5)  # as many as the decoder has
    sites = find_sites(model, ("projection",))
    assert {site.name for site in sites if site.reads_encoder} == {
        f"decoder.block.{layer}.layer.1.EncDecAttention:projection_{role}"
        for layer in range(2)
        for role in ("key", "value")
    }
    seen: list[Tensor] = []
    handle = model.decoder.block[0].layer[1].EncDecAttention.k.register_forward_hook(lambda *a: seen.append(a[-1]))
    with clue_fast.patch(model, kinds=("projection_key",)) as patched:
        with patched.record("forget"), torch.no_grad():
            model(**batch)
        statistics = patched.statistics
    handle.remove()
    attended, answers = batch["attention_mask"].bool(), batch["labels"] != -100
    norms = seen[-1].unflatten(-1, (4, 8)).norm(dim=-1)[attended].double()
    for site in statistics.sites:
        counted = int(statistics.count[0, statistics.number(site)])
        decoded = site.path.startswith("decoder") and not site.reads_encoder
        assert counted == int((answers if decoded else attended).sum()), site.name
        if site.path == "decoder.block.0.layer.1.EncDecAttention":
            torch.testing.assert_close(statistics.of(site, "forget").mean, norms.mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [p for p in ALL if p.values[0] != "t5"])
def test_statistics_are_those_of_what_each_projection_gives(name: str) -> None:
    """Norms, and sums of products with the gradient, against hooks on the stock model, at tokens chosen at random."""
    model, batch = make_model(name, torch.float64), make_batch(name)
    group = torch.randint(0, 2, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1)).to(torch.int8)
    slices, output = LAYOUTS[name]
    seen: dict[str, list[Tensor]] = {}
    handles = []

    def watch(key: str, rows: list[list[int]] | None, x: Tensor) -> Tensor:
        x = x.clone()
        if rows is None:
            rows = [stretch(unit * (x.shape[-1] // 4), x.shape[-1] // 4) for unit in range(4)]
        h = torch.stack([x[..., own] for own in rows], dim=-2).detach()
        seen[key] = [h.square().sum(-1).sqrt()]

        def keep(gradient: Tensor) -> None:
            g = torch.stack([gradient[..., own] for own in rows], dim=-2)
            seen[key].append((h * g).sum(-1))

        x.register_hook(keep)
        return x

    def all_of(module: str, roles: dict[str, list[list[int]]]) -> Any:
        def hook(_: Any, args: Any, y: Tensor) -> Tensor:
            for role, rows in roles.items():
                y = watch(f"{module}:{role}", rows, y)
            return y

        return hook

    for path, module in model.named_modules():
        if not any(word in path.lower() for word in ("attn", "attention")):
            continue
        end = path.rpartition(".")[2]
        roles = {role: rows for role, (own, rows) in slices.items() if own == end}
        if roles:
            handles.append(module.register_forward_hook(all_of(path, roles)))
        elif end == output:
            handles.append(module.register_forward_pre_hook(lambda _, a, p=path: watch(f"{p}:output", None, a[0])))
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()

    with clue_fast.patch(model, kinds=("projection",)) as patched:
        with patched.record("forget", gradients=True):
            model(**batch, token_group=group).loss.backward()
        statistics = patched.statistics
    assert len(statistics.sites) == 8
    for site in statistics.sites:
        role = site.kind.removeprefix("projection_")
        activations, products = (
            x.reshape(-1, site.width)[group.flatten() == 1] for x in seen[f"{module_of(site)}:{role}"]
        )
        own = statistics.of(site, "forget")
        torch.testing.assert_close(own.mean, activations.mean(0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.variance, activations.var(0, correction=0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(own.attribution, products.mean(0), rtol=1e-7, atol=1e-10)


def test_recording_them_leaves_the_model_as_it_was() -> None:
    model, batch = make_model("gpt_neox"), make_batch("gpt_neox")
    plain = model(**batch).logits
    with clue_fast.patch(model, kinds=("mlp", "projection")) as patched:
        with patched.record("forget"):
            assert torch.equal(model(**batch).logits, plain)
        assert all(kind in str(patched.report()) for kind in KINDS)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**batch).logits, plain)


def test_whole_heads_and_their_projections_do_not_go_together() -> None:
    model = make_model("llama")
    sites = tuple(find_sites(model, ("attention", "projection")))
    ones = {site: torch.full((site.width,), CONFLICT, dtype=torch.int8) for site in sites}
    zeros = {site: torch.zeros(site.width) for site in sites}
    with pytest.raises(SparseError, match="two selected units own the same slice"):
        sparsify(model, Selection(sites, ones, zeros, {}, model_fingerprint(model)))
    with pytest.raises(UnknownNameError, match="projection_key"):
        find_sites(model, ("projection_gate",))


def test_a_selection_of_whole_heads_from_before_still_loads_and_trains(tmp_path: Path) -> None:
    """Kinds and names of heads are those of selections that were saved earlier."""
    model = make_model("llama")
    for kind, end in (("attention_query", ":attention_query"), ("attention_key_value", ":attention_key_value")):
        saved = select(model, kind, [1], CONFLICT)
        saved.save(tmp_path / f"{kind}.safetensors")
        loaded = Selection.load(tmp_path / f"{kind}.safetensors", model)
        assert all(site.name.endswith(end) for site in loaded.sites) and loaded.hash == saved.hash
        for site in loaded.sites:  # as a file has it that was written before there were such sites
            fields = {name: value for name, value in site.as_dict().items() if name != "reads_encoder"}
            assert Site.from_dict(fields) == site
        with sparsify(model, loaded) as sparse:
            assert {part.path.rpartition(".")[0].rpartition(".")[2] for part in sparse.slices} == (
                {"q_proj", "o_proj"} if kind == "attention_query" else {"k_proj", "v_proj"}
            )
