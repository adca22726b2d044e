"""Objectives against their formulas, written out record by record and token by token in Python floats."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clue_fast.errors import DataError, ObjectiveError, UnknownNameError
from clue_fast.objectives import (
    DPO,
    KL,
    NPO,
    OBJECTIVES,
    RMU,
    UNDIAL,
    WGA,
    GradientAscent,
    GradientDifference,
    Refusal,
    SimNPO,
    get_objective,
    passes,
    predict,
)
from clue_fast.sparse import SparseAdamW, sparsify

VOCABULARY = 7


class Table(nn.Module):
    """A language model that looks its logits up by the token: [vocabulary, vocabulary]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.logits = nn.Parameter(table * 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


class Stack(nn.Module):
    """Three layers that look up, scale and add: what they give is known by the token alone."""

    def __init__(self, seed: int, features: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.states = nn.Parameter(torch.randn(4, VOCABULARY, features, generator=generator))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool, output_hidden_states: bool) -> Any:
        assert output_hidden_states
        return SimpleNamespace(hidden_states=tuple(states[input_ids] for states in self.states))


class Original:
    """Swaps another model's parameters in, and remembers what is announced; stands for a ``Sparse``."""

    def __init__(self, model: nn.Module, original: nn.Module) -> None:
        self.model, self.other = model, original
        self.reached: list[tuple[int, int, int]] = []

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        self.reached.append((forget, records, tokens))

    @contextmanager
    def original(self) -> Any:
        pairs = list(zip(self.model.parameters(), self.other.parameters(), strict=True))
        current = [p.data for p, _ in pairs]
        for p, q in pairs:
            p.data = q.data
        yield
        for (p, _), data in zip(pairs, current, strict=True):
            p.data = data


def make_records(seed: int, records: int = 5, tokens: int = 8) -> dict[str, Tensor]:
    """Random tokens, a random part of them labels, right-padded to different lengths."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, VOCABULARY, (records, tokens), generator=generator)
    lengths = torch.randint(3, tokens + 1, (records, 1), generator=generator)
    attended = torch.arange(tokens) < lengths
    counted = (torch.rand(records, tokens, generator=generator) < 0.6) & attended
    counted[:, 2] = True
    return {
        "input_ids": input_ids.masked_fill(~attended, 0),
        "labels": input_ids.masked_fill(~counted, -100),
        "attention_mask": attended.long(),
    }


def batches(seed: int) -> dict[str, dict[str, Tensor]]:
    return {
        "forget": make_records(seed),
        "alternate": make_records(seed + 20, tokens=6),
        "retain": make_records(seed + 50, records=4, tokens=11),
    }


def log_softmax(row: list[float]) -> list[float]:
    return [x - math.log(sum(math.exp(y) for y in row)) for x in row]


def tokens_of(model: Table, batch: dict[str, Tensor]) -> list[list[tuple[list[float], int]]]:
    """For each record: (log-probabilities over the vocabulary, label) of each of its labels."""
    table = [log_softmax(row) for row in model.logits.tolist()]
    return [
        [(table[previous], label) for previous, label in zip(tokens[:-1], labels[1:], strict=True) if label != -100]
        for tokens, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
    ]


def log_likelihoods(model: Table, batch: dict[str, Tensor]) -> list[tuple[float, int]]:
    """(log p(x), |x|) of each record."""
    return [(sum(row[label] for row, label in record), len(record)) for record in tokens_of(model, batch)]


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def loss_of(model: Table, batch: dict[str, Tensor]) -> float:
    return mean(-total / count for total, count in log_likelihoods(model, batch))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def forget_formula(objective: Any, model: Table, original: Table, b: dict[str, dict[str, Tensor]]) -> float:
    p, q = log_likelihoods(model, b["forget"]), log_likelihoods(original, b["forget"])
    if isinstance(objective, GradientAscent):
        return mean(total / count for total, count in p)
    if isinstance(objective, NPO):
        ratios = [math.exp(now) / math.exp(then) for (now, _), (then, _) in zip(p, q, strict=True)]
        return mean(2 / objective.beta * math.log(1 + ratio**objective.beta) for ratio in ratios)
    if isinstance(objective, SimNPO):
        inner = [-objective.beta / count * total - objective.gamma for total, count in p]
        return mean(-2 / objective.beta * math.log(sigmoid(x)) for x in inner)
    if isinstance(objective, WGA):
        records = tokens_of(model, b["forget"])
        return mean(mean(math.exp(row[y]) ** objective.alpha * row[y] for row, y in record) for record in records)
    if isinstance(objective, UNDIAL):
        records = zip(tokens_of(model, b["forget"]), tokens_of(original, b["forget"]), strict=True)
        return mean(
            mean(undial_token(row, then, y, objective.strength) for (row, y), (then, _) in zip(*pair, strict=True))
            for pair in records
        )
    if isinstance(objective, Refusal):
        return loss_of(model, b["alternate"])
    assert isinstance(objective, DPO)
    idk, idk_then = log_likelihoods(model, b["alternate"]), log_likelihoods(original, b["alternate"])
    margins = [(i[0] - it[0]) - (f[0] - ft[0]) for i, it, f, ft in zip(idk, idk_then, p, q, strict=True)]
    return mean(-2 / objective.beta * math.log(sigmoid(objective.beta * margin)) for margin in margins)


def undial_token(now: list[float], then: list[float], label: int, strength: float) -> float:
    target = log_softmax([z - strength * (k == label) for k, z in enumerate(then)])
    return -sum(math.exp(t) * log_p for t, log_p in zip(target, now, strict=True))


def retain_formula(objective: Any, model: Table, original: Table, batch: dict[str, Tensor]) -> float:
    if not isinstance(objective, KL):
        return loss_of(model, batch)
    p, q = ([log_softmax(row) for row in one.logits.tolist()] for one in (model, original))
    records = []
    for tokens, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        read = [token for token, attended in zip(tokens, mask, strict=True) if attended][:-1]
        records.append(mean(sum(math.exp(b) * (b - a) for a, b in zip(p[t], q[t], strict=True)) for t in read))
    return mean(records)


@pytest.mark.parametrize(
    "objective",
    [
        GradientAscent(),
        GradientDifference(retain_weight=0.7),
        KL(),
        KL(retain_weight=0.3),
        NPO(),
        NPO(beta=1.3, retain_weight=5.0),
        SimNPO(),
        SimNPO(beta=0.9, gamma=0.4, retain_weight=0.0),
        WGA(),
        WGA(alpha=0.3, retain_weight=0.0),
        UNDIAL(),
        UNDIAL(strength=2.0, retain_weight=1.0),
        Refusal(),
        Refusal(retain_weight=0.0),
        DPO(),
        DPO(beta=0.8, retain_weight=0.5),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_its_formula(objective, seed):
    model, original, b = Table(seed), Table(seed + 100), batches(seed)
    trained = Original(model, original)
    loss, logs = objective.loss(model, b, trained)
    expected = term = forget_formula(objective, model, original, b)
    assert ("retain_loss" in logs) == (objective.retain_weight > 0)
    if objective.retain_weight:
        kept = retain_formula(objective, model, original, b["retain"])
        expected += objective.retain_weight * kept
        assert logs["retain_loss"].item() == pytest.approx(kept, rel=1e-5)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logs["forget_loss"].item() == pytest.approx(term, rel=1e-5)
    if "forget" in objective.forget_batches:
        assert logs["forget_nll"].item() == pytest.approx(loss_of(model, b["forget"]), rel=1e-5)
    assert not any(value.requires_grad for value in logs.values())
    forget = 5 * len(objective.forget_batches)
    longest = {"forget": 8, "alternate": 6, "retain": 11 if objective.retain_weight else 0}
    tokens = max(longest[name] for name in (*objective.forget_batches, "retain"))
    # In one pass or several, in which those to be forgotten come first.
    announced = [sum(numbers) for numbers in zip(*trained.reached, strict=True)][:2]
    assert announced == [forget, forget + 4 * (objective.retain_weight > 0)]
    assert max(of_pass for _, _, of_pass in trained.reached) <= tokens


@pytest.mark.parametrize(
    ("objective", "layer"),
    [
        (RMU(layer=0), 0),
        (RMU(layer=1, scale=2.0, seed=3, retain_weight=0.5), 1),
        (RMU(layer=1, retain_weight=0.0), 1),
        (RMU(layer=0.01), 0),
        (RMU(layer=1 / 3), 0),
        (RMU(layer=0.6, retain_weight=2.0), 1),
        (RMU(layer=1, tokens="answer"), 1),
    ],
)
def test_rmu_equals_its_formula(objective, layer):
    model, original, b = Stack(0), Stack(1), batches(0)
    loss, logs = objective.loss(model, b, Original(model, original))
    direction = torch.rand(5, generator=torch.Generator().manual_seed(objective.seed)).double()
    target = (objective.scale * direction / direction.square().sum().sqrt()).tolist()
    now, then = (one.states[layer + 1].tolist() for one in (model, original))
    terms = {}
    for side in ("forget", "retain"):
        columns = (b[side][name].tolist() for name in ("input_ids", "attention_mask", "labels"))
        distances = []
        for tokens, mask, labels in zip(*columns, strict=True):
            predicting = [label != -100 for label in labels[1:]] + [False]
            counted = predicting if objective.tokens == "answer" else mask
            where = [
                (now[t], target if side == "forget" else then[t]) for t, c in zip(tokens, counted, strict=True) if c
            ]
            distances.append(mean(sum((x - y) ** 2 for x, y in zip(*pair, strict=True)) for pair in where))
        terms[side] = mean(distances)
    assert logs["forget_loss"].item() == pytest.approx(terms["forget"], rel=1e-5)
    assert loss.item() == pytest.approx(terms["forget"] + objective.retain_weight * terms["retain"], rel=1e-5)
    if objective.retain_weight:
        assert logs["retain_loss"].item() == pytest.approx(terms["retain"], rel=1e-5)


# What each paper writes, of the probabilities that a model gives to the tokens of each answer, with their number of
# tokens differing. NOW is the model that trains, THEN the original one.
NOW = {
    "forget": [[0.9, 0.5, 0.7], [0.2], [0.35, 0.99]],
    "alternate": [[0.1, 0.3], [0.6, 0.4, 0.05, 0.8], [0.5]],
    "retain": [[0.95, 0.4], [0.7, 0.6, 0.9]],
}
THEN = {
    "forget": [[0.8, 0.9, 0.95], [0.6], [0.3, 0.9]],
    "alternate": [[0.2, 0.1], [0.5, 0.7, 0.02, 0.9], [0.4]],
    "retain": [[0.97, 0.5], [0.6, 0.8, 0.99]],
}


class Saying(nn.Module):
    """Says yes with a given probability after each token, and no otherwise; every token is another one."""

    def __init__(self, answers: dict[str, list[list[float]]]) -> None:
        super().__init__()
        rows = [[0.0, 0.0]]
        self.batches: dict[str, dict[str, Tensor]] = {}
        for name, records in answers.items():
            longest = max(map(len, records)) + 1
            ids, labels = [], []
            for record in records:
                padding = longest - len(record) - 1
                ids.append([*range(len(rows), len(rows) + len(record)), 0] + [0] * padding)
                labels.append([-100] + [0] * len(record) + [-100] * padding)
                rows += [[math.log(p) + 3, math.log(1 - p) + 3] for p in record]
            attended = [[1] * (len(record) + 1) + [0] * (longest - len(record) - 1) for record in records]
            self.batches[name] = {
                "input_ids": torch.tensor(ids),
                "labels": torch.tensor(labels),
                "attention_mask": torch.tensor(attended),
            }
        self.logits = nn.Parameter(torch.tensor(rows))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.logits[input_ids])


def tofu_loss(records: list[list[float]]) -> float:
    """L(S, w) of TOFU: l(x, w) = 1 / |a| sum_i NLL(a_i | a_<i), and its mean over the records."""
    return sum(sum(-math.log(p) for p in record) / len(record) for record in records) / len(records)


def log_pi(record: list[float]) -> float:
    """log pi(y | x), of the whole answer."""
    return math.log(math.prod(record))


def log_ratios(name: str) -> list[float]:
    return [log_pi(now) - log_pi(then) for now, then in zip(NOW[name], THEN[name], strict=True)]


def tofu_kl() -> float:
    """1 / |S_R| sum_s 1 / |s| sum_i KL(M_original(s_<i) || M_current(s_<i))."""
    records = []
    for now, then in zip(NOW["retain"], THEN["retain"], strict=True):
        tokens = [q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p)) for p, q in zip(now, then, strict=True)]
        records.append(sum(tokens) / len(tokens))
    return sum(records) / len(records)


def paper_npo(beta: float) -> float:
    """arXiv 2404.05868: (2 / beta) E log(1 + (pi / pi_ref) ** beta)."""
    return sum(2 / beta * math.log(1 + math.exp(ratio) ** beta) for ratio in log_ratios("forget")) / 3


def paper_simnpo(beta: float, gamma: float) -> float:
    """arXiv 2410.07163: E -(2 / beta) log sigmoid(-(beta / |y|) log pi(y | x) - gamma)."""
    terms = []
    for record in NOW["forget"]:
        inner = -beta / len(record) * log_pi(record) - gamma
        terms.append(2 / beta * math.log(1 + math.exp(-inner)))
    return sum(terms) / 3


def paper_wga(alpha: float) -> float:
    """arXiv 2502.19301 as its code weighs tokens, w_i log p_i with w_i = p_i ** alpha; the mean over each answer."""
    return sum(sum(p**alpha * math.log(p) for p in record) / len(record) for record in NOW["forget"]) / 3


def paper_undial(strength: float) -> float:
    """arXiv 2402.10052: cross-entropy to softmax(z - strength * onehot), z the logits of the original model."""
    records = []
    for now, then in zip(NOW["forget"], THEN["forget"], strict=True):
        tokens = []
        for p, q in zip(now, then, strict=True):
            left = q * math.exp(-strength)
            target = left / (left + 1 - q)
            tokens.append(-target * math.log(p) - (1 - target) * math.log(1 - p))
        records.append(sum(tokens) / len(tokens))
    return sum(records) / 3


def paper_dpo(beta: float) -> float:
    """arXiv 2305.18290, equation 7, times 2 / beta as in the code of arXiv 2404.05868."""
    pairs = zip(log_ratios("alternate"), log_ratios("forget"), strict=True)
    return sum(2 / beta * math.log(1 + math.exp(-beta * (winner - loser))) for winner, loser in pairs) / 3


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("gradient_ascent", {}, lambda: -tofu_loss(NOW["forget"])),
        ("gradient_difference", {}, lambda: -tofu_loss(NOW["forget"]) + tofu_loss(NOW["retain"])),
        ("kl", {}, lambda: -tofu_loss(NOW["forget"]) + tofu_kl()),
        ("npo", {}, lambda: paper_npo(0.1) + tofu_loss(NOW["retain"])),
        ("npo", {"beta": 2.0, "retain_weight": 0.0}, lambda: paper_npo(2.0)),
        ("simnpo", {"retain_weight": 0.0}, lambda: paper_simnpo(2.5, 0.0)),
        ("simnpo", {"beta": 4.5, "gamma": 1.0, "retain_weight": 0.0}, lambda: paper_simnpo(4.5, 1.0)),
        ("wga", {}, lambda: paper_wga(1.0) + tofu_loss(NOW["retain"])),
        ("wga", {"alpha": 0.5, "retain_weight": 0.0}, lambda: paper_wga(0.5)),
        ("undial", {}, lambda: paper_undial(10.0)),
        ("undial", {"strength": 3.0}, lambda: paper_undial(3.0)),
        ("refusal", {}, lambda: tofu_loss(NOW["alternate"]) + tofu_loss(NOW["retain"])),
        ("dpo", {}, lambda: paper_dpo(0.1) + tofu_loss(NOW["retain"])),
        ("dpo", {"beta": 1.0, "retain_weight": 0.0}, lambda: paper_dpo(1.0)),
    ],
)
def test_equals_its_paper_on_given_probabilities(name, options, expected):
    model, original = Saying(NOW), Saying(THEN)
    loss, _ = OBJECTIVES[name](**options).loss(model, model.batches, Original(model, original))
    assert loss.item() == pytest.approx(expected(), rel=1e-5)


def test_simnpo_weighs_both_terms_as_its_authors_on_tofu():
    """0.1375 times the forget term plus the retain term, but for a common factor."""
    model = Saying(NOW)
    loss, _ = SimNPO().loss(model, model.batches, Original(model, model))
    published = 0.1375 * paper_simnpo(2.5, 0.0) + tofu_loss(NOW["retain"])
    assert 0.1375 * loss.item() == pytest.approx(published, rel=1e-3)


def test_simnpo_margin_of_the_public_code_is_the_same_loss_with_another_gamma():
    beta, margin = 2.5, 0.4
    model = Saying(NOW)
    published = [
        -2 / beta * math.log(sigmoid(beta * (-log_pi(record) / len(record) - margin))) for record in NOW["forget"]
    ]
    loss, _ = SimNPO(beta=beta, gamma=beta * margin, retain_weight=0.0).loss(
        model, model.batches, Original(model, model)
    )
    assert loss.item() == pytest.approx(mean(published), rel=1e-5)


def test_dpo_forgets_as_hard_as_npo_whatever_beta():
    """At the original model, the gradient of the forgotten answers is the same, and that of gradient ascent."""
    b = {"forget": make_records(0, records=1), "alternate": make_records(20, records=1, tokens=6)}
    for beta in (0.01, 0.1, 1.0):
        model = Table(0)
        dpo = gradient(DPO(beta=beta, retain_weight=0.0), model, copy.deepcopy(model), b)
        npo = gradient(NPO(beta=beta, retain_weight=0.0), model, copy.deepcopy(model), b)
        learned = gradient(Refusal(retain_weight=0.0), model, model, b) * log_likelihoods(model, b["alternate"])[0][1]
        torch.testing.assert_close(dpo, npo + learned)


def gradient(objective: Any, model: nn.Module, original: nn.Module, b: Any) -> Tensor:
    for parameter in model.parameters():
        parameter.grad = None
    objective.loss(model, b, Original(model, original))[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradient_of_npo_is_weighted_gradient_ascent():
    """Per record, that of log p times 2 p^b / (p^b + q^b): what keeps NPO from running away."""
    model, original, b = Table(0), Table(1), {"forget": make_records(0, records=1)}
    npo = gradient(NPO(beta=0.5, retain_weight=0.0), model, original, b)
    ascent = gradient(GradientAscent(), model, original, b)
    (log_p, count), (log_q, _) = (log_likelihoods(m, b["forget"])[0] for m in (model, original))
    p, q = math.exp(log_p) ** 0.5, math.exp(log_q) ** 0.5
    torch.testing.assert_close(npo, ascent * count * (2 * p / (p + q)))


def test_gradient_of_wga_does_not_pass_through_its_weight():
    model, b = Table(0), {"forget": make_records(0)}
    assert torch.equal(
        gradient(WGA(alpha=0.0, retain_weight=0.0), model, model, b), gradient(GradientAscent(), model, model, b)
    )
    found = gradient(WGA(alpha=1.0, retain_weight=0.0), model, model, b).view(VOCABULARY, VOCABULARY)
    expected = torch.zeros(VOCABULARY, VOCABULARY)
    for record, tokens, labels in zip(
        tokens_of(model, b["forget"]), b["forget"]["input_ids"].tolist(), b["forget"]["labels"].tolist(), strict=True
    ):
        read = [t for t, label in zip(tokens[:-1], labels[1:], strict=True) if label != -100]
        for token, (row, label) in zip(read, record, strict=True):
            softmax = torch.tensor(row).exp()
            one_hot = torch.nn.functional.one_hot(torch.tensor(label), VOCABULARY)
            expected[token] += math.exp(row[label]) * (one_hot - softmax) / len(record) / 5
    torch.testing.assert_close(found, expected)


def test_kl_at_the_original_keeps_still():
    model, b = Table(0), batches(0)
    twin = copy.deepcopy(model)
    assert KL().loss(model, b, Original(model, twin))[1]["retain_loss"].item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(gradient(KL(), model, twin, b), gradient(GradientAscent(), model, model, b))


@given(seed=st.integers(0, 1000), padding=st.integers(0, 5))
def test_padding_does_not_matter(seed, padding):
    model, batch = Table(0), make_records(seed)
    padded = {
        key: torch.cat([value, torch.full((len(value), padding), -100 if key == "labels" else 0)], 1)
        for key, value in batch.items()
    }
    one, other = (predict(model, {"forget": b})["forget"] for b in (batch, padded))
    torch.testing.assert_close(one.mean(one.losses), other.mean(other.losses))
    assert torch.equal(one.tokens, other.tokens)


def test_record_without_answer_counts_nothing():
    batch = make_records(0)
    batch["labels"][0] = -100
    found = predict(Table(0), {"forget": batch})["forget"]
    assert found.total(found.losses)[0] == 0 and found.tokens[0] == 0 and found.mean(found.losses)[0] == 0
    batch["labels"][:, 1:] = -100  # a label on the first token has nothing to predict it from
    assert predict(Table(0), {"forget": batch})["forget"].losses.sum() == 0


@pytest.mark.parametrize("name", ["npo", "kl", "undial"])
def test_reference_is_the_original_model(name, make_model, make_selection, make_batch):
    """Through a trained sparse model, with dropout on: for each record the bits of a copy that was made beforehand."""
    model, b = make_model(attention_dropout=0.5), {"forget": make_batch(), "retain": make_batch(seed=1)}
    original = copy.deepcopy(model).eval().requires_grad_(False)
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-2)
    for _ in range(5):
        model.train()
        model.zero_grad()
        model(**b["forget"]).loss.backward()
        optimizer.step()
    objective = get_objective(name, retain_weight=1.0)
    asked: list[Tensor] = []
    reference_outputs = type(objective).reference_outputs
    object.__setattr__(
        objective, "reference_outputs", lambda p: asked.append(reference_outputs(objective, p)) or asked[-1]
    )
    model.model.layers[0].eval()
    loss, _ = objective.loss(model, b, sparse)
    used = objective.batches(b, "causal")
    (side,) = objective.original_batches
    assert len(asked) == len(b[side]["labels"])
    for record, found in enumerate(asked):
        length = int(used[side]["attention_mask"][record].sum())
        alone = {name: tensor[record : record + 1, :length] for name, tensor in used[side].items()}
        expected = predict(original, {side: alone})[side]
        assert torch.equal(found, reference_outputs(objective, expected))
    assert not asked[0].requires_grad
    assert not model.model.layers[0].mlp.training and model.model.layers[1].mlp.training
    loss.backward()
    assert all(p.grad is not None for p in sparse.trainable_parameters)


def test_one_pass_a_step_and_one_for_each_record_of_the_reference(make_model, make_selection, make_batch, monkeypatch):
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 1000, "cuda": 1000})
    model, b = make_model(), {"forget": make_batch(), "retain": make_batch(seed=1)}
    sparse = sparsify(model, make_selection(model))
    records: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: records.append(len(kwargs["input_ids"])), with_kwargs=True)
    GradientAscent().loss(model, b, sparse)
    SimNPO().loss(model, b, sparse)
    NPO().loss(model, b, sparse)
    assert records == [4, 8, 1, 1, 1, 1, 8]
    NPO().loss(model, b, sparse)
    assert records[7:] == [8]  # the original is as it was


def test_says_what_is_missing():
    model = Table(0)
    trained = Original(model, model)
    with pytest.raises(ObjectiveError, match=r"simnpo with a retain_weight of 7\.27 needs retain records"):
        SimNPO().loss(model, {"forget": make_records(0)}, trained)
    with pytest.raises(ObjectiveError, match="dpo needs alternate records"):
        DPO().loss(model, {"forget": make_records(0), "retain": make_records(1)}, trained)
    odd = {"forget": make_records(0), "retain": {**make_records(1), "position_ids": torch.zeros(5, 8)}}
    with pytest.raises(DataError, match="position_ids is an input of some batches only"):
        SimNPO().loss(model, odd, trained)
    with pytest.raises(ObjectiveError, match="rmu steers layer 7, Stack has 3 layers; give it a layer below 2"):
        RMU().loss(Stack(0), batches(0), Original(Stack(0), Stack(0)))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (0.9, "rmu steers layer 2, Stack has 3 layers; give it a layer below 2"),
        (1.0, r"rmu steers the layer at the share 1\.0 of the depth; give a share between 0 and 1, or the index"),
        (0.0, r"the share 0\.0 of the depth"),
        (float("nan"), "the share nan of the depth"),
        (-1, "rmu steers layer -1, Stack has 3 layers"),
    ],
)
def test_rmu_refuses_a_layer_that_it_cannot_steer(layer, message):
    with pytest.raises(ObjectiveError, match=message):
        RMU(layer=layer).loss(Stack(0), batches(0), Original(Stack(0), Stack(0)))


@pytest.mark.parametrize(("layer", "index"), [(2, 2), (0.25, 0), (0.5, 1)])
def test_rmu_trains_units_up_to_its_layer(layer, index, make_model, make_selection, make_batch):
    model, b = make_model(layers=4), {"forget": make_batch(), "retain": make_batch(seed=1)}
    sparse = sparsify(model, make_selection(model))
    RMU(layer=layer).loss(model, b, sparse)[0].backward()
    assert all((one.values.grad is not None) == (one.layer <= index) for one in sparse.slices)
    SparseAdamW(model, lr=1e-2).step()
    moved = {one.layer for one in sparse.slices if not torch.equal(one.read(), one.original)}
    assert moved == set(range(index + 1))


def test_rmu_refuses_tokens_that_there_are_not():
    with pytest.raises(ObjectiveError, match='"all" or "answer", not \'last\''):
        RMU(layer=0, tokens="last").loss(Stack(0), batches(0), Original(Stack(0), Stack(0)))


def test_rmu_names_a_layer_below_all_units(make_model, make_selection, make_batch):
    model, b = make_model(), {"forget": make_batch(), "retain": make_batch(seed=1)}
    sparse = sparsify(model, make_selection(model, layers=[1]))
    with pytest.raises(ObjectiveError, match="rmu at layer 0 reaches no unit that trains"):
        RMU(layer=0).loss(model, b, sparse)
    RMU(layer=1).loss(model, b, sparse)[0].backward()
    assert all(p.grad is not None for p in sparse.trainable_parameters)


def test_get_objective():
    assert sorted(OBJECTIVES) == [
        "dpo", "gradient_ascent", "gradient_difference", "kl", "npo", "refusal", "rmu", "simnpo", "undial", "wga",
    ]  # fmt: skip
    assert all(cls.name == name for name, cls in OBJECTIVES.items())
    assert all(get_objective(name) == cls() for name, cls in OBJECTIVES.items() if name != "undial")
    assert get_objective("npo", retain_weight=5.0) == NPO(beta=0.1, retain_weight=5.0)
    assert SimNPO() == SimNPO(beta=2.5, gamma=0.0, retain_weight=7.27)  # TOFU forget05: 1 / 0.1375
    assert WGA() == WGA(alpha=1.0) and UNDIAL() == UNDIAL(strength=10.0, retain_weight=0.0)
    assert DPO() == DPO(beta=0.1, retain_weight=1.0)
    assert RMU() == RMU(layer=7, scale=6.5, retain_weight=1200.0)
    assert get_objective(SimNPO(gamma=1.0), beta=3.0) == SimNPO(beta=3.0, gamma=1.0)
    with pytest.raises(UnknownNameError, match="unknown objective 'ga'; choose one of: dpo, gradient_ascent"):
        get_objective("ga")
    with pytest.raises(TypeError):
        get_objective("gradient_ascent", beta=0.1)
