"""Objectives against their formulas, written out record by record and token by token in Python floats."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clue_fast.errors import UnknownNameError
from clue_fast.training import (
    NPO,
    OBJECTIVES,
    GradientAscent,
    GradientDifference,
    SimNPO,
    SparseAdamW,
    get_objective,
    sparsify,
)
from clue_fast.training.objectives import record_loss

VOCABULARY = 7


class Table(nn.Module):
    """A language model that looks its logits up by the token: [vocabulary, vocabulary]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(table * 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


def make_batch(seed: int, records: int = 5, tokens: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (records, tokens), generator=generator)
    counted = torch.rand(records, tokens, generator=generator) < 0.6
    counted[:, -1] = True
    labels = input_ids.masked_fill(~counted, -100)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}


def negative_log_likelihoods(model: Table, batch: dict[str, Tensor]) -> list[tuple[float, int]]:
    """(-log p(x), |x|) of each record."""
    table = model.logits.tolist()
    found = []
    for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        total, count = 0.0, 0
        for previous, label in zip(tokens[:-1], labels[1:], strict=True):
            if label != -100:
                total -= table[previous][label] - math.log(sum(math.exp(x) for x in table[previous]))
                count += 1
        found.append((total, count))
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def retain_term(model: Table, batch: dict[str, Tensor]) -> float:
    return mean([total / count for total, count in negative_log_likelihoods(model, batch)])


@contextmanager
def table_of(model: Table, original: Table) -> Any:
    current = model.logits.data
    model.logits.data = original.logits.data
    yield
    model.logits.data = current


def formula(name: str, model: Table, original: Table, forget: dict[str, Tensor], **p: float) -> float:
    now = negative_log_likelihoods(model, forget)
    then = negative_log_likelihoods(original, forget)
    if name in ("gradient_ascent", "gradient_difference"):
        return -mean([total / count for total, count in now])
    if name == "npo":
        ratios = [math.exp(-a) / math.exp(-b) for (a, _), (b, _) in zip(now, then, strict=True)]
        return mean([2 / p["beta"] * math.log(1 + ratio ** p["beta"]) for ratio in ratios])
    logits = [p["beta"] * total / count - p["gamma"] for total, count in now]
    return mean([-2 / p["beta"] * math.log(1 / (1 + math.exp(-logit))) for logit in logits])


@pytest.mark.parametrize(
    ("objective", "parameters"),
    [
        (GradientAscent(), {}),
        (GradientDifference(retain_weight=0.7), {}),
        (NPO(), {"beta": 0.1}),
        (NPO(beta=1.3, retain_weight=5.0), {"beta": 1.3}),
        (SimNPO(), {"beta": 2.5, "gamma": 0.0}),
        (SimNPO(beta=0.9, gamma=0.4, retain_weight=0.0), {"beta": 0.9, "gamma": 0.4}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_its_formula(objective, parameters, seed):
    model, original = Table(seed), Table(seed + 100)
    forget, retain = make_batch(seed), make_batch(seed + 50)
    loss, logs = objective.loss(model, forget, retain, lambda: table_of(model, original))
    term = formula(objective.name, model, original, forget, **parameters)
    expected = term
    if objective.retain_weight:
        expected += objective.retain_weight * retain_term(model, retain)
        assert logs["retain_loss"].item() == pytest.approx(retain_term(model, retain), rel=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logs["forget_loss"].item() == pytest.approx(term, rel=1e-5)
    assert logs["forget_nll"].item() == pytest.approx(retain_term(model, forget), rel=1e-5)
    assert not any(value.requires_grad for value in logs.values())


def test_gradient_of_npo_is_weighted_gradient_ascent():
    """Per record, that of log p times 2 p^b / (p^b + q^b): what keeps NPO from running away."""
    model, original, batch = Table(0), Table(1), make_batch(0, records=1)
    NPO(beta=0.5, retain_weight=0.0).loss(model, batch, None, lambda: table_of(model, original))[0].backward()
    gradient = model.logits.grad.clone()
    model.logits.grad = None
    (-record_loss(model, batch).total.sum()).backward()
    p, q = (math.exp(-negative_log_likelihoods(m, batch)[0][0]) ** 0.5 for m in (model, original))
    torch.testing.assert_close(gradient, model.logits.grad * (2 * p / (p + q)))


@given(seed=st.integers(0, 1000), padding=st.integers(0, 5))
def test_padding_does_not_matter(seed, padding):
    model, batch = Table(0), make_batch(seed)
    padded = {
        key: torch.cat([value, torch.full((len(value), padding), -100 if key == "labels" else 0)], 1)
        for key, value in batch.items()
    }
    for one, other in zip(record_loss(model, batch), record_loss(model, padded), strict=True):
        torch.testing.assert_close(one, other)


def test_record_without_answer_counts_nothing():
    batch = make_batch(0)
    batch["labels"][0] = -100
    found = record_loss(Table(0), batch)
    assert found.total[0] == 0 and found.tokens[0] == 0 and found.mean[0] == 0
    batch["labels"][:, 1:] = -100  # a label on the first token has nothing to predict it from
    assert record_loss(Table(0), batch).total.sum() == 0


def test_reference_is_the_original_model(make_model, make_selection, make_batch):
    """Through a trained sparse model, with dropout on: the same bits as a copy made beforehand."""
    model, forget, retain = make_model(attention_dropout=0.5), make_batch(), make_batch(seed=1)
    original = copy.deepcopy(model).eval()
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-2)
    for _ in range(5):
        model.train()
        model.zero_grad()
        model(**forget).loss.backward()
        optimizer.step()
    found = NPO()._reference_loss(model, forget, sparse.original)
    assert torch.equal(found.total, record_loss(original, forget).total)
    assert not found.total.requires_grad
    assert all(module.training for module in model.modules())
    model.model.layers[0].eval()
    loss, _ = NPO().loss(model, forget, retain, sparse.original)
    assert not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training
    loss.backward()
    assert all(p.grad is not None for p in sparse.trainable_parameters)


def test_retain_batch_is_not_run_without_weight(make_model, make_batch):
    model = make_model()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    GradientAscent().loss(model, make_batch(), None, nullcontext)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="no retain batch"):
        SimNPO().loss(model, make_batch(), None, nullcontext)


def test_get_objective():
    assert sorted(OBJECTIVES) == ["gradient_ascent", "gradient_difference", "npo", "simnpo"]
    assert get_objective("npo", retain_weight=5.0) == NPO(beta=0.1, retain_weight=5.0)
    assert get_objective(SimNPO(gamma=1.0), beta=3.0) == SimNPO(beta=3.0, gamma=1.0)
    with pytest.raises(UnknownNameError, match="unknown objective 'dpo'; choose one of: gradient_ascent"):
        get_objective("dpo")
    with pytest.raises(TypeError):
        get_objective("gradient_ascent", beta=0.1)
