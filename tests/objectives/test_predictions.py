"""What objectives read of a model against the plain loss on full logits: values, gradients, and what is never kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.data import Collator
from clue_fast.errors import ObjectiveError
from clue_fast.objectives import NPO, UNDIAL, original, passes, predict
from clue_fast.objectives import predictions as module
from clue_fast.objectives.passes import passes_by_length
from clue_fast.objectives.predictions import Head, Predictions
from clue_fast.sparse import sparsify
from tests.models import families

CAUSAL = sorted(name for name, family in families.FAMILIES.items() if family.task == families.CAUSAL)


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three labels at a time, so that runs end anywhere in a record."""
    monkeypatch.setattr(module, "RUN_BYTES", 0)
    monkeypatch.setattr(module, "LEAST_RUN", 3)


@pytest.fixture
def many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for every length."""
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 0, "cuda": 0})


def only_some_train(model: nn.Module) -> list[Tensor]:
    """One weight matrix of the first layer, and no others."""
    model.requires_grad_(False)
    name = next(name for name, p in model.named_parameters() if p.dim() > 1 and ".0." in name)
    return [model.get_parameter(name).requires_grad_()]


def plain_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-log p of every label of a causal model, [labels], from its full logits."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return losses[labels.reshape(-1) != -100]


def weights_of(losses: Tensor) -> Tensor:
    """Another weight for each loss, so that a gradient that is given to the wrong label is seen."""
    return torch.linspace(-1.0, 2.0, len(losses))


def gradient(losses: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((losses * weights_of(losses)).sum(), parameters))


@pytest.mark.parametrize("name", CAUSAL)
def test_losses_and_gradients_are_those_of_full_logits(name, short_runs):
    """In every family, soft caps, scales and biases behind the head included; twice, since a model is learned first."""
    model, batch = families.make_model(name), families.make_batch(name)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0] = -100  # a record without an answer
    batch["labels"][1, :-1] = -100  # one with a single token of it
    parameters = only_some_train(model)
    expected = plain_losses(model, batch)
    wanted = gradient(expected, parameters)
    for _ in range(2):
        found = predict(model, {"forget": batch})["forget"].losses
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient(found, parameters), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("setting", [{"final_logit_softcapping": 2.0}, {"final_logit_softcapping": None}])
def test_a_soft_cap_is_the_models_own(setting, short_runs):
    """A low cap changes every loss; without one the head is all there is."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(**{**families.SIZES, "head_dim": 8, **setting})
    model = transformers.Gemma2ForCausalLM(config).requires_grad_(False)
    model.lm_head.weight.data.mul_(30.0)
    batch = families.make_batch("gemma2")
    for _ in range(2):
        found = predict(model, {"forget": batch})["forget"]
        torch.testing.assert_close(found.losses, plain_losses(model, batch), rtol=1e-5, atol=1e-6)
        capped = setting["final_logit_softcapping"] is not None
        assert (found.head.module is None) == capped
        assert not capped or bool((found.logits.abs() <= 2.0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype, make_model, make_batch, short_runs):
    """The error against float64 is at most twice that of the plain loss, of losses and of gradients."""
    model, batch = make_model(dtype), make_batch(6)
    wide = make_model(torch.float64)
    for mine, its in zip(wide.parameters(), model.parameters(), strict=True):
        mine.data = its.data.double()
    only_some_train(model), only_some_train(wide)
    exact = plain_losses_in_double(wide, batch)
    reference = torch.autograd.grad((exact * weights_of(exact)).sum(), one(wide))[0]
    errors = {}
    for name, losses in (
        ("plain", plain_losses(model, batch)),
        ("ours", predict(model, {"forget": batch})["forget"].losses),
    ):
        found = gradient(losses, one(model))[0]
        errors[name] = [(losses - exact).abs().max(), (found.double() - reference).abs().max()]
    rounding = torch.finfo(dtype).eps
    for mine, its, size in zip(errors["ours"], errors["plain"], (exact, reference), strict=True):
        assert mine <= 2 * its + rounding * size.abs().max()


def one(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def plain_losses_in_double(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    chosen = batch["labels"][:, 1:] != -100
    picked = logits[chosen].log_softmax(-1)
    return -picked[torch.arange(len(picked)), batch["labels"][:, 1:][chosen]]


def test_a_head_that_trains_has_its_gradient(make_model, make_batch):
    """Then logits are kept: ours is for heads that are frozen."""
    model, batch = make_model(), make_batch()
    expected = torch.autograd.grad(plain_losses(model, batch).sum(), model.lm_head.weight)[0]
    for _ in range(2):
        found = predict(model, {"forget": batch})["forget"]
        assert found.head.module is None
        torch.testing.assert_close(torch.autograd.grad(found.losses.sum(), model.lm_head.weight)[0], expected)


def test_a_head_that_freezes_and_trains_again(make_model, make_batch):
    model, batch = make_model(), make_batch()
    expected = plain_losses(model, batch)
    for frozen in (True, True, False, True):
        model.lm_head.requires_grad_(not frozen)
        found = predict(model, {"forget": batch})["forget"]
        assert (found.head.module is None) != frozen
        torch.testing.assert_close(found.losses, expected)


@pytest.mark.usefixtures("many_passes", "short_runs")
@pytest.mark.parametrize("records", [1, 2, 7])
def test_passes_of_similar_length_change_nothing(records, make_model, make_batch):
    model = make_model()
    batches = {"forget": make_batch(records, 1), "alternate": make_batch(3, 2), "retain": make_batch(4, 3)}
    parameters = only_some_train(model)
    passes: list[tuple[int, int, int]] = []
    found = predict(model, batches, lambda *numbers: passes.append(numbers))
    assert len(passes) > 2
    assert [sum(numbers) for numbers in zip(*passes, strict=True)][:2] == [records + 3, records + 7]
    lengths = sorted(int(n) for batch in batches.values() for n in batch["attention_mask"].sum(-1))
    assert sorted(tokens for _, _, tokens in passes) == sorted(set(lengths))
    for name, batch in batches.items():
        expected = plain_losses(model, batch)
        torch.testing.assert_close(found[name].losses, expected, rtol=1e-6, atol=1e-6)
        wanted = gradient(expected, parameters)
        torch.testing.assert_close(
            list(torch.autograd.grad((found[name].losses * weights_of(expected)).sum(), parameters, retain_graph=True)),
            wanted,
            rtol=1e-5,
            atol=1e-6,
        )


@pytest.mark.usefixtures("many_passes")
def test_the_records_to_forget_come_first_in_every_pass(make_model, make_batch, make_selection, monkeypatch):
    """Forget units get the gradient of the forget records alone, in several passes as in one."""
    model = make_model()
    batches = {"forget": make_batch(5, 1), "retain": make_batch(6, 2)}
    sparse = sparsify(model, make_selection(model, forget=4))

    def gradients() -> list[Tensor]:
        found = predict(model, batches, sparse.set_batch_layout)
        (found["forget"].losses.sum() - 3 * found["retain"].losses.sum()).backward()
        grads = [p.grad.clone() for p in sparse.trainable_parameters]
        model.zero_grad()
        return grads

    several = gradients()
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 10**6, "cuda": 10**6})
    torch.testing.assert_close(several, gradients(), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("many_passes")
@pytest.mark.parametrize("why", ["padded on the left", "checkpointing", "wrapped"])
def test_one_pass_where_several_might_change_something(why, make_model, make_batch):
    model, batch = make_model().train(), make_batch(6)
    if why == "padded on the left":
        batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    elif why == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    passes: list[tuple[int, int, int]] = []
    wrapped = torch.compile(model, backend="eager") if why == "wrapped" else model
    predict(wrapped, {"forget": batch}, lambda *numbers: passes.append(numbers))
    assert passes == [(6, 6, batch["input_ids"].shape[1])]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), cost=st.integers(0, 60))
def test_no_pass_pads_more_than_a_further_one_costs(lengths, cost):
    passes = passes_by_length(lengths, cost)
    assert sorted(index for records in passes for index in records) == list(range(len(lengths)))
    for records in passes:
        own = [lengths[index] for index in records]
        assert own and sum(max(own) - length for length in own) <= cost


def test_no_tensor_as_wide_as_the_vocabulary_is_kept(make_model, make_batch, monkeypatch):
    """Neither saved for the backward pass, nor larger than a run while it is made."""
    monkeypatch.setattr(module, "RUN_BYTES", 0)
    monkeypatch.setattr(module, "LEAST_RUN", 4)
    vocabulary = 997
    model = make_model(vocab_size=vocabulary)
    sparse_like = only_some_train(model)
    batch = make_batch(8)
    predict(model, {"forget": batch})
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: rows.append(out.shape[:-1].numel()))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        found = predict(model, {"forget": batch})["forget"]
        losses = found.losses
    labels = int((batch["labels"][:, 1:] != -100).sum())
    assert max(rows) <= 4 and sum(rows) == labels == len(losses)
    wide = [t for t in saved if vocabulary in t.shape and t.data_ptr() != model.lm_head.weight.data_ptr()]
    assert all(t.numel() <= 4 * vocabulary for t in wide)  # of runs, whose graphs are gone
    assert gradient(losses, sparse_like)[0].any()


def test_nll_comes_along(make_model, make_batch):
    """With a function of the logits comes -log p, and by itself it is the same."""
    model, batch = make_model(), make_batch()
    model.requires_grad_(False)
    expected = plain_losses(model, batch)
    calls: list[int] = []
    for _ in range(2):
        found = predict(model, {"forget": batch})["forget"]
        model.lm_head.register_forward_hook(lambda _, __, out: calls.append(1))
        values = found.by_label(lambda logits, labels: logits.logsumexp(-1), nll=True)
        before = len(calls)
        torch.testing.assert_close(found.nll, expected)
        assert len(calls) == before and values.shape == expected.shape
        torch.testing.assert_close(predict(model, {"forget": batch})["forget"].nll, expected)


@pytest.mark.parametrize("labels", [0, 1, 3, 4])
def test_numbers_of_labels_around_a_run(labels, short_runs):
    head = nn.Linear(5, 11).requires_grad_(False)
    states = torch.randn(labels, 5, requires_grad=True)
    answers = torch.arange(labels)
    counted = torch.ones(1, labels, dtype=torch.bool)
    found = Predictions(states, answers, counted, Head(head, ("cpu", torch.bfloat16, False)))
    expected = functional.cross_entropy(states @ head.weight.t() + head.bias, answers, reduction="none")
    torch.testing.assert_close(found.losses, expected)
    weights = torch.linspace(1, 2, labels)
    mine, its = (torch.autograd.grad((one * weights).sum(), states)[0] for one in (found.losses, expected))
    torch.testing.assert_close(mine, its)


def test_refuses_what_the_head_does_not_read(make_model, make_batch):
    model, batch = make_model().requires_grad_(False), make_batch()
    found = predict(model, {"forget": batch})["forget"]
    with pytest.raises(ObjectiveError, match="wrap or compile the model before it trains"):
        found.by_label(lambda logits, labels, other: other.sum(-1), torch.zeros(len(found.labels), 64))


# The original model.


@pytest.fixture
def counted(make_model, make_selection) -> Iterator[tuple[Any, Any, list[int]]]:
    """A sparse model, and how many records each of its passes had."""
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    records: list[int] = []
    model.register_forward_pre_hook(lambda _, __, kwargs: records.append(len(kwargs["input_ids"])), with_kwargs=True)
    yield model, sparse, records


@pytest.mark.parametrize("objective", [NPO(), UNDIAL(retain_weight=1.0)])
def test_the_original_is_asked_once_for_each_record(objective, counted, make_examples):
    model, sparse, records = counted
    examples, collate = make_examples(6), Collator(0)
    retain = collate(make_examples(2, 9))
    losses = {}
    for some in ([0, 1, 2], [3, 1, 0], [5, 4, 2], [2, 1, 3]):
        records.clear()
        loss, _ = objective.loss(model, {"forget": collate([examples[i] for i in some]), "retain": retain}, sparse)
        losses[tuple(some)] = loss.item()
        asked = [n for n in records if n == 1][: len(records) - 1]
        assert len(asked) == {(0, 1, 2): 3, (3, 1, 0): 1, (5, 4, 2): 2, (2, 1, 3): 0}[tuple(some)]
    sparse.original_outputs.clear()
    again, _ = objective.loss(model, {"forget": collate([examples[i] for i in (2, 1, 3)]), "retain": retain}, sparse)
    assert again.item() == losses[2, 1, 3]  # to the bit: a record is asked by itself


def test_what_does_not_fit_is_asked_again(counted, make_batch, monkeypatch):
    monkeypatch.setattr(original, "KEPT_BYTES", 30)
    model, sparse, records = counted
    batches = {"forget": make_batch(), "retain": make_batch(2, 5)}
    expected = NPO().loss(model, batches, sparse)[0].item()
    assert 0 < sum(t.nbytes for t in sparse.original_outputs.values()) <= 30
    records.clear()
    assert NPO().loss(model, batches, sparse)[0].item() == expected
    assert 2 <= len(records) < 5


def test_nothing_is_kept_past_other_weights_and_the_end(counted, make_batch):
    model, sparse, _ = counted
    batches = {"forget": make_batch(), "retain": make_batch(2, 5)}
    NPO().loss(model, batches, sparse)
    assert len(sparse.original_outputs) == 4
    NPO(beta=0.3).loss(model, batches, sparse)
    assert len(sparse.original_outputs) == 8
    model.load_state_dict(model.state_dict())
    assert not sparse.original_outputs
    NPO().loss(model, batches, sparse)
    sparse.restore()
    assert not sparse.original_outputs and not model._load_state_dict_post_hooks
