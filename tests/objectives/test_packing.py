"""Records packed into rows against records that are padded: losses, gradients, and which models and steps refuse."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clue_fast import ConflictCallback
from clue_fast.errors import ObjectiveError, SettingError
from clue_fast.objectives import NPO, OBJECTIVES, get_objective
from clue_fast.objectives.packing import check_packing, pack, rows_of
from clue_fast.objectives.passes import passes_of, run_passes
from clue_fast.sparse import sparsify
from clue_fast.trainer import UnlearnTrainer
from tests.models import families

CAUSAL = sorted(name for name, family in families.FAMILIES.items() if family.task == families.CAUSAL)


def losses(model, batches, packed_tokens=None):
    found = run_passes(model, passes_of(model, batches, packed_tokens))
    return torch.cat([found[name].losses for name in batches])


@pytest.mark.parametrize("name", CAUSAL)
def test_every_family_is_right_or_refused(name):
    """A refused one is in fact wrong: what it predicts for records in a row is not what it predicts for them padded."""
    model = families.make_model(name).eval().requires_grad_(False)
    batches = {"forget": families.make_batch(name), "retain": families.make_batch(name, rows=2, seed=1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        padded, packed = losses(model, batches), losses(model, batches, 64)
    far = float((packed - padded).abs().max() / padded.abs().max())
    try:
        check_packing(model)
    except ObjectiveError as error:
        assert type(model).__name__ in str(error) and "leave packed_tokens out" in str(error)
        assert far > 1e-5
    else:
        assert far < 1e-6


def test_most_families_can_be_packed_and_some_cannot():
    def can(name):
        try:
            check_packing(families.make_model(name))
        except ObjectiveError:
            return False
        return True

    assert all(map(can, ("llama", "gemma3", "gpt2", "mixtral"))) and not any(map(can, ("bloom", "opt")))


@pytest.mark.parametrize("make", ["bert", "t5"])
def test_only_causal_heads(make):
    with pytest.raises(ObjectiveError, match="no causal head"):
        check_packing(families.make_model(make))


def test_a_row(make_batch):
    """The tokens of the records one behind another, with positions of their own; nothing predicts a first token."""
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [4, 3, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    row = pack({"input_ids": ids, "attention_mask": mask, "labels": ids, "token_group": mask})
    assert row["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert row["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, 3, 2, 1]]
    assert row["token_group"].tolist() == [[1] * 9]
    assert "attention_mask" not in row


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 50))
def test_rows_hold_every_record_once_within_the_budget(lengths, most_tokens):
    rows = rows_of(lengths, most_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[index] for index in row) <= most_tokens
    # No two rows could be one.
    sizes = sorted(sum(lengths[index] for index in row) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > most_tokens


@pytest.mark.parametrize(
    ("name", "forget", "tokens"),
    [*((name, 3, 16) for name in sorted(set(OBJECTIVES) - {"rmu"})), ("npo", 0, 16), ("dpo", 3, 1), ("npo", 3, 10**6)],
)
def test_a_step_is_that_of_padded_records(name, forget, tokens, make_model, make_selection, make_batch):
    """Loss, logs and gradients, also of units that retain records do not train, and of rows that hold one record."""
    model, objective = make_model(), get_objective(name, retain_weight=0.7)
    sparse = sparsify(model, make_selection(model, forget=forget))
    for number, trained in enumerate(sparse.slices):
        trained.set_values(trained.original + 0.05 * (-1) ** number)
    batches = {"forget": make_batch(5), "alternate": make_batch(5, seed=3), "retain": make_batch(3, seed=1)}
    found = []
    for sparse.packed_tokens in (None, tokens):
        for sparse.backward_by_pass in (False, True):
            loss, logs = objective.loss(model, batches, sparse)
            gradients = torch.autograd.grad(loss, sparse.trainable_parameters, allow_unused=True)
            found.append((loss.detach(), logs, [g for g in gradients if g is not None]))
    expected = found[0]
    for one in found[1:]:
        torch.testing.assert_close(one[0], expected[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one[1], expected[1], rtol=1e-5, atol=1e-6)
        scale = max(float(gradient.abs().max()) for gradient in expected[2])
        for own, other in zip(one[2], expected[2], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda batch: {**batch, "attention_mask": batch["attention_mask"].flip(1)}, "not padded on the right"),
        (lambda batch: {**batch, "token_type_ids": batch["input_ids"] * 0}, "token_type_ids"),
    ],
)
def test_steps_that_cannot_be_packed(change, reason, make_model, make_selection, make_batch):
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    sparse.packed_tokens = 64
    batch = make_batch(4)
    batch["attention_mask"][:, -1] = 0
    with pytest.raises(ObjectiveError, match=f"cannot be packed: .*{reason}.*leave packed_tokens out"):
        NPO().loss(model, {"forget": change(batch), "retain": change(batch)}, sparse)


def test_checkpointing_and_wrapping(make_model, make_selection, make_batch):
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    sparse.packed_tokens = 64
    batches = {"forget": make_batch(3), "retain": make_batch(3, seed=1)}
    with pytest.raises(ObjectiveError, match="DataParallel"):
        NPO().loss(torch.nn.DataParallel(model), batches, sparse)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ObjectiveError, match="gradient checkpointing"):
        NPO().loss(model, batches, sparse)


class TestTrainer:
    @pytest.fixture
    def train(self, make_model, make_selection, make_examples, make_arguments):
        """train(model=None, watch=None, **settings) -> the trainer, after its steps; watched by a callback."""

        def train(model=None, watch=None, **settings):
            model = make_model() if model is None else model
            trainer = UnlearnTrainer(
                model,
                make_arguments(),
                forget_dataset=make_examples(6),
                retain_dataset=make_examples(12, seed=1),
                retain_ratio=1,
                selection=make_selection(model),
                **settings,
            )
            if watch is not None:
                trainer.add_callback(watch(trainer))
            trainer.train()
            return trainer

        return train

    def test_trains_what_padded_records_train(self, train):
        padded, packed = train(), train(packed_tokens=48)
        assert packed.sparse.packed_tokens == 48
        losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (padded, packed)]
        assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-5)
        for mine, its in zip(packed.sparse.slices, padded.sparse.slices, strict=True):
            assert not torch.equal(its.master(), its.original)
            torch.testing.assert_close(mine.master(), its.master(), rtol=1e-4, atol=1e-5)

    def test_conflict_scores_are_those_of_the_same_tokens(self, train):
        watched = []

        def watch(trainer):
            watched.append(ConflictCallback(trainer))
            return watched[-1]

        train(watch=watch), train(watch=watch, packed_tokens=48)
        padded, packed = (callback.scores for callback in watched)
        assert len(padded) > 1
        for site, scores in padded.items():
            torch.testing.assert_close(packed[site], scores, rtol=1e-3, atol=1e-4 * float(scores.max()))

    @pytest.mark.parametrize("tokens", [0, -4, 2.5, True])
    def test_tokens_are_a_positive_integer(self, tokens, train):
        with pytest.raises(SettingError, match=r"packed_tokens .* is not a positive integer"):
            train(packed_tokens=tokens)

    def test_refused_before_anything_changes(self, train, make_model):
        model = make_model()
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ObjectiveError, match=r"rmu runs the batches of a step itself.*leave packed_tokens out"):
            train(model, packed_tokens=64, objective="rmu")
        assert {name: type(module) for name, module in model.named_modules()} == before
