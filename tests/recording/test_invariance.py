"""Statistics do not depend on how the same tokens are fed: batches, padding, packing, order, passes.

In float64, where activations do not depend on the shape of the batch they are computed in, to the last digits; in
float32 within what PyTorch's own matrix products differ by from shape to shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import clue_fast

KINDS = ("mlp", "attention")
Record = tuple[list[int], int]


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.3,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


MODELS = {torch.float64: build().double(), torch.float32: build()}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DTYPES = st.sampled_from(list(MODELS))


def padded(records: Sequence[Record], side: str = "right") -> dict[str, Tensor]:
    """A batch of records, each of whose tokens is in the record's group."""
    length = max(len(ids) for ids, _ in records)
    rows: dict[str, list[list[int]]] = {name: [] for name in ("input_ids", "attention_mask", "position_ids")}
    for ids, _ in records:
        fill = length - len(ids)
        for name, values in {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "position_ids": list(range(len(ids))),
        }.items():
            rows[name].append([0] * fill + values if side == "left" else values + [0] * fill)
    batch = {name: torch.tensor(values) for name, values in rows.items()}
    return batch | {"token_group": torch.tensor([group for _, group in records], dtype=torch.int8)}


def packed(records: Sequence[Record]) -> dict[str, Tensor]:
    """All records in one row, told apart by positions that begin anew."""
    ids = [token for tokens, _ in records for token in tokens]
    positions = [position for tokens, _ in records for position in range(len(tokens))]
    groups = [group for tokens, group in records for _ in tokens]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "token_group": torch.tensor([groups], dtype=torch.int8),
    }


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch with every token of its records as label; in a packed row, all but the first of each record."""
    ids = batch["input_ids"]
    first = (batch["position_ids"] == 0) & ("attention_mask" not in batch)
    return batch | {"labels": ids.masked_fill((batch.get("attention_mask", ids) == 0) | first, -100)}


def recorded(
    batches: Sequence[dict[str, Tensor]], dtype: torch.dtype = torch.float32, gradients: bool = False
) -> clue_fast.Statistics:
    model = MODELS[dtype]
    with clue_fast.patch(model, kinds=KINDS) as patched, torch.set_grad_enabled(gradients):
        with patched.record("forget", gradients=gradients):
            for batch in batches:
                logits = model(**batch).logits
                if gradients:
                    group = patched._recorder.batch.towers["text"].group  # padding has no part in the loss
                    logits.flatten(0, 1)[group > 0].square().sum().backward()
        return patched.statistics


def assert_same(left: clue_fast.Statistics, right: clue_fast.Statistics, tolerance: float) -> None:
    assert torch.equal(left.count, right.count)
    for found, expected in zip(left.tensors(), right.tensors(), strict=True):
        if found.is_floating_point():
            scale = expected.abs().amax(dim=-1, keepdim=True)
            assert bool(((found - expected).abs() <= tolerance * scale).all())


@st.composite
def corpora(draw: Callable[[Any], Any]) -> list[Record]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    generator = random.Random(draw(st.integers(0, 2**16)))
    return [([generator.randrange(3, 64) for _ in range(n)], draw(st.integers(0, 2))) for n in lengths]


def one_by_one(corpus: Sequence[Record], **how: Any) -> clue_fast.Statistics:
    return recorded([padded([record]) for record in corpus], **how)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    corpus=corpora(),
    size=st.sampled_from([1, 4, 16]),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 99),
    dtype=DTYPES,
)
def test_batches_padding_and_order(corpus: list[Record], size: int, side: str, seed: int, dtype: torch.dtype) -> None:
    shuffled = random.Random(seed).sample(corpus, len(corpus))
    batches = [padded(shuffled[start : start + size], side) for start in range(0, len(shuffled), size)]
    assert_same(recorded(batches, dtype), one_by_one(corpus, dtype=dtype), TOLERANCE[dtype])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corpus=corpora(), cut=st.integers(0, 7), dtype=DTYPES)
def test_packing(corpus: list[Record], cut: int, dtype: torch.dtype) -> None:
    batches = [packed(part) for part in (corpus[:cut], corpus[cut:]) if part]
    assert_same(recorded(batches, dtype), one_by_one(corpus, dtype=dtype), TOLERANCE[dtype])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corpus=corpora(), cut=st.integers(0, 7))
def test_merging_recordings(corpus: list[Record], cut: int) -> None:
    parts = [one_by_one(part) for part in (corpus[:cut], corpus[cut:])]
    assert_same(parts[0].merge(parts[1]), one_by_one(corpus), 1e-12)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corpus=corpora(), size=st.sampled_from([1, 4]))
def test_gradients_and_accumulation(corpus: list[Record], size: int) -> None:
    batches = [padded(corpus[start : start + size]) for start in range(0, len(corpus), size)]
    found, expected = recorded(batches, torch.float64, True), one_by_one(corpus, dtype=torch.float64, gradients=True)
    assert_same(found, expected, TOLERANCE[torch.float64])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(corpus=corpora(), size=st.sampled_from([1, 4, 16]), side=st.sampled_from(["left", "right"]))
def test_answers_in_batches_with_padding_and_packed(corpus: list[Record], size: int, side: str) -> None:
    """Every token but the last of a record predicts one: neither does padding, nor a record the next one of its row."""
    expected = recorded([labelled(padded([record])) for record in corpus], torch.float64)
    tokens = [sum(len(ids) - 1 for ids, group in corpus if group == number) for number in (1, 2)]
    assert expected.count[:, 0].tolist() == tokens
    batches = [labelled(padded(corpus[start : start + size], side)) for start in range(0, len(corpus), size)]
    assert_same(recorded(batches, torch.float64), expected, TOLERANCE[torch.float64])
    rows = []
    for group in (1, 2):  # by row, since by token nothing but token_group counts
        if part := [record for record in corpus if record[1] == group]:
            rows.append(labelled(packed(part)) | {"token_group": torch.tensor([group], dtype=torch.int8)})
    assert_same(recorded(rows, torch.float64), expected, TOLERANCE[torch.float64])


CORPUS: list[Record] = [([5, 9, 30, 12], 1), ([7, 7, 41], 2), ([60, 3, 8, 19, 22], 1), ([11], 2)]


def test_the_same_run_twice_gives_the_same_bits() -> None:
    batches = [padded(CORPUS[:2]), padded(CORPUS[2:])]
    first, second = (recorded(batches, gradients=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_token_and_one_token(dtype: torch.dtype) -> None:
    model = build().to(dtype)
    with clue_fast.patch(model, kinds=KINDS) as patched, torch.no_grad():
        with patched.record("forget"):
            model(torch.tensor([[5, 6]]), token_group=torch.zeros(1, 2, dtype=torch.int8))
            assert int(patched.statistics.count.sum()) == 0
            model(torch.tensor([[5]]))
        assert patched.statistics.count[0].unique().tolist() == [1]
        site = patched.sites[0]
        found = patched.statistics.of(site, "forget")
        assert float(found.variance.max()) == 0.0
