"""Conflict scores while a trainer trains, and units selected anew on the way."""

from __future__ import annotations

import pytest
import torch

import clue_fast
from clue_fast.data import Collator
from clue_fast.errors import PatchError, SettingError, SparseError, UnknownNameError
from clue_fast.recording import Patched
from clue_fast.sparse import SparseAdamW, SparseSGD, changed_outside, snapshot, sparsify
from clue_fast.statistics import Statistics
from clue_fast.trainer.trainer import UnlearnTrainer


@pytest.fixture
def make_trainer(make_model, make_selection, make_examples, make_arguments):
    def make(model=None, objective="npo", **settings):
        model = make_model() if model is None else model
        return UnlearnTrainer(
            model,
            make_arguments(**{"num_train_epochs": 3} | settings),
            forget_dataset=make_examples(8, seed=1),
            retain_dataset=make_examples(8, seed=2),
            selection=make_selection(model),
            objective=objective,
        )

    return make


def figures(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("objective", ["npo", "simnpo", "gradient_difference", "kl"])
def test_scores_are_those_of_the_batches_that_trained(objective, make_trainer):
    """Rates of 0: what is logged in training is what hooks on the same tokens give, without those of the reference."""
    trainer = make_trainer(objective=objective, learning_rate=0.0, num_train_epochs=1, logging_steps=2)
    callback = clue_fast.ConflictCallback(trainer)
    trainer.add_callback(callback)
    trainer.train()
    model = trainer.sparse.model
    seen = {}
    for name, data in (("forget", trainer.train_dataset.forget), ("retain", trainer.train_dataset.retain)):
        for example in data:
            kept = {}
            hooks = [
                site_module.register_forward_pre_hook(lambda m, x, i=i, kept=kept: kept.update({i: x[0][0].double()}))
                for i, site_module in enumerate(layer.mlp.down_proj for layer in model.model.layers)
            ]
            with torch.no_grad():
                model(torch.tensor([example["input_ids"]]))
            for hook in hooks:
                hook.remove()
            predicting = [i - 1 for i, label in enumerate(example["labels"]) if label != -100]
            for i, h in kept.items():
                seen.setdefault((name, i), []).append(h[predicting])
    for i, (site, scores) in enumerate(callback.scores.items()):
        forget, retain = (torch.cat(seen[name, i]) for name in ("forget", "retain"))
        spread = ((forget.var(0, correction=0) + retain.var(0, correction=0)) / 2).sqrt()
        expected = (forget.mean(0) - retain.mean(0)).abs() / spread
        assert (scores.double() - expected).abs().max() <= 1e-4 * expected.max(), site
    (selected,), (others,) = figures(trainer, "conflict_selected"), figures(trainer, "conflict_others")
    units = [callback.scores[site][trainer.sparse.selection.units(site)] for site in callback.scores]
    assert selected == pytest.approx(float(torch.cat(units).mean()), rel=1e-5)
    everything = torch.cat(list(callback.scores.values()))
    assert others * (len(everything) - 15) + selected * 15 == pytest.approx(float(everything.sum()), rel=1e-4)


@pytest.mark.parametrize("criterion", ["difference", "welch", "attribution"])
def test_what_is_logged_was_written_while_training(criterion, make_trainer, monkeypatch):
    """All units are scored by themselves where a recording begins, on nothing, and never to log them."""
    trainer = make_trainer(num_train_epochs=1, logging_steps=1)
    callback = clue_fast.ConflictCallback(trainer, criterion=criterion)
    trainer.add_callback(callback)
    computed, begun, logged = [], [], []
    score, record, figures_of = Statistics._score, Patched.record, callback._figures
    monkeypatch.setattr(Statistics, "_score", lambda self, *how: computed.append(how[0]) or score(self, *how))
    monkeypatch.setattr(
        Patched, "record", lambda self, *a, **how: begun.append(how["score"]) or record(self, *a, **how)
    )

    def checked():
        expected = clue_fast.score(
            trainer.sparse_training.patched.statistics.merge(callback._since_selection.empty()), criterion
        )
        computed.clear()
        begun.clear()
        found = figures_of()
        logged.append(len(computed) - len(begun))
        assert all(torch.equal(expected[site], callback.scores[site]) for site in expected)
        return found

    callback._figures = checked
    trainer.train()
    assert logged and set(logged) == {0} and begun[-1] == criterion


def test_watching_changes_training_by_rounding_only(make_trainer):
    plain, watched = make_trainer(), make_trainer()
    watched.add_callback(clue_fast.ConflictCallback(watched, criterion="attribution"))
    for trainer in (plain, watched):
        trainer.train()
    for (name, one), other in zip(plain.model.state_dict().items(), watched.model.state_dict().values(), strict=True):
        assert (one - other).abs().max() < 2e-5, name
    overlap = figures(watched, "conflict_overlap")
    assert len(overlap) == 6 and all(0 <= value <= 1 for value in overlap)
    assert len(figures(watched, "loss")) == 6
    clue_fast.patch(watched.model).unpatch()  # it was left unpatched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selects_anew(dtype, make_trainer, make_model):
    model = make_model(dtype)
    before = snapshot(model)
    # As many units in every layer as the selection has: 5 of 48.
    trainer = make_trainer(model)
    callback = clue_fast.ConflictCallback(trainer, relocalize_every=2)
    trainer.add_callback(callback)
    trainer.train()
    first, second, third = callback.selections
    assert [len(s) for s in callback.selections] == [15, 15, 15]
    assert first.overlap(second) < 1 and trainer.sparse.selection is third
    moved = {site: (first | second | third).units(site) for site in first.sites}
    # Units of all three selections have moved, and nothing else has.
    for (site, units), layer in zip(moved.items(), model.model.layers, strict=True):
        old, new = before[f"model.layers.{site.layer}.mlp.down_proj.weight"], layer.mlp.down_proj.weight
        assert torch.nonzero((old != new).any(0)).flatten().tolist() == units.tolist()
    assert changed_outside(before, model, first | second | third) == 0
    # The original model is still there, and comes back whole.
    trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with trainer.sparse.original():
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(trained[name], tensor) for name, tensor in model.state_dict().items())
    trainer.sparse.revert()
    trainer.sparse.restore()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [SparseAdamW, SparseSGD])
def test_units_that_stay_selected_keep_their_masters(optimizer, make_model, make_selection, make_batch):
    model = make_model(torch.bfloat16)
    one, other = make_selection(model, seed=1), make_selection(model, seed=2)
    sparse = sparsify(model, one)
    trained = optimizer(model, lr=1e-6)  # less than bfloat16 can show
    model(**make_batch()).loss.backward()
    trained.step()
    kept = {(p.path, int(i)): p.values.select(p.dim, n).clone() for p in sparse.slices for n, i in enumerate(p.index)}
    sparse.reselect(one | other)
    trained.rebuild_param_groups(model)
    again = {(p.path, int(i)): p.values.select(p.dim, n) for p in sparse.slices for n, i in enumerate(p.index)}
    assert set(kept) < set(again) and all(torch.equal(kept[key], again[key]) for key in kept)
    model(**make_batch()).loss.backward()
    trained.step()
    assert all(state["step"] == 1 for state in trained.state.values())


def test_a_selection_that_cannot_be_keeps_the_old_one(make_model, make_selection, make_batch):
    model = make_model()
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] = float("nan")
    everything = clue_fast.select(
        clue_fast.Scores(
            {s: torch.ones(s.width) for s in sparse.selection.sites}, "ones", sparse.selection.fingerprint
        ),
        fraction=1.0,
    )
    before = sparse.selection
    with pytest.raises(ArithmeticError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        sparse.reselect(everything)
    assert sparse.selection is before
    optimizer.rebuild_param_groups(model)
    fewer = make_selection(model, layers=[0, 2])
    sparse.reselect(fewer)
    with pytest.raises(SparseError, match=r"layers \[0, 2\] now, the rates are of \[0, 1, 2\]"):
        optimizer.rebuild_param_groups(model)


def test_refuses_by_name(make_trainer, make_model, make_arguments, make_examples, make_selection):
    from transformers import Trainer

    trainer = make_trainer()
    with pytest.raises(UnknownNameError, match="unknown criterion 'nonsense'"):
        clue_fast.ConflictCallback(trainer, criterion="nonsense")
    with pytest.raises(SettingError, match="'salun' needs mean gradients"):
        clue_fast.ConflictCallback(trainer, criterion="salun")
    with pytest.raises(SettingError, match="relocalize_every 0"):
        clue_fast.ConflictCallback(trainer, relocalize_every=0)
    model = make_model()
    stock = Trainer(model, make_arguments(), train_dataset=make_examples(8), data_collator=Collator(0))
    with pytest.raises(SettingError, match="does not train selected units"):
        clue_fast.ConflictCallback(stock)
    clue_fast.attach(stock, make_selection(model))
    stock.add_callback(clue_fast.ConflictCallback(stock))
    with pytest.raises(PatchError, match="no forget token was recorded"):
        stock.train()


def test_a_model_that_is_patched_already(make_trainer):
    trainer = make_trainer()
    trainer.add_callback(clue_fast.ConflictCallback(trainer))
    patched = clue_fast.patch(trainer.model)
    with pytest.raises(PatchError, match="was patched before the training; unpatch it"):
        trainer.train()
    patched.unpatch()
    trainer.train()
    assert len(figures(trainer, "conflict_selected")) == 6


def test_several_processes_are_refused_by_name(make_trainer, monkeypatch):
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(SparseError, match="DistributedDataParallel keeps to the parameters"):
        trainer.reselect(trainer.sparse.selection)


def test_scores_at_any_time(make_model, make_batch):
    model = make_model()
    with clue_fast.patch(model) as patched:
        with pytest.raises(PatchError, match="no forget token"):
            patched.scores()
        with patched.record("retain"):
            model(**make_batch(seed=1))
        with patched.record("forget"):
            model(**make_batch(seed=2))
            inside = patched.scores("ratio")
        after = patched.scores("ratio")
        assert after.criterion == "ratio" and list(after) == list(patched.sites)
        expected = clue_fast.score(patched.statistics, "ratio")
        for site in patched.sites:
            assert torch.equal(inside[site], expected[site]) and torch.equal(after[site], expected[site])
