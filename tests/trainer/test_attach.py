"""attach: a Trainer that somebody else wrote, here in the style of open-unlearning, trains selected units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import Trainer

import clue_fast
from clue_fast.data import Collator
from clue_fast.errors import SelectionError, SparseError
from clue_fast.sparse import SparseAdamW, changed_inside, changed_outside, snapshot, sparsify
from clue_fast.sparse.slices import trainable_slices
from clue_fast.trainer import attach
from clue_fast.trainer.pairing import PairCollator


class FinetuneTrainer(Trainer):
    """A base class that overrides a method of its own."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {"evaluated": 1.0}


class GradDiff(FinetuneTrainer):
    """Inputs hold "forget" and "retain"; the model is run on each of them."""

    def __init__(self, gamma: float = 1.0, alpha: float = 1.0, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gamma = gamma
        self.alpha = alpha

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        sides = {}
        for side in ("forget", "retain"):
            names = ("input_ids", "attention_mask", "labels")
            sides[side] = model(**{name: inputs[side][name] for name in names})
        loss = -self.gamma * sides["forget"].loss + self.alpha * sides["retain"].loss
        return (loss, sides["forget"]) if return_outputs else loss


class Joined(GradDiff):
    """Runs the model on tensors of its own making."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**{name: tensor.clone() for name, tensor in inputs["forget"].items()}).loss


@pytest.fixture
def make_foreign(make_arguments, make_examples):
    def make(model: Any, cls: type = GradDiff, optimizers: Any = (None, None), **settings: Any) -> Any:
        pairs = zip(make_examples(8, seed=1), make_examples(8, seed=2), strict=True)
        return cls(
            alpha=0.5,
            model=model,
            args=make_arguments(remove_unused_columns=False, num_train_epochs=2, weight_decay=0.1, **settings),
            train_dataset=[{"forget": [forget], "retain": [retain]} for forget, retain in pairs],
            data_collator=PairCollator(Collator(0)),
            optimizers=optimizers,
        )

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_the_selection_only(dtype, make_model, make_selection, make_foreign):
    model = make_model(dtype)
    selection, before = make_selection(model), snapshot(model)
    trainer = make_foreign(model)
    sparse = clue_fast.attach(trainer, selection, layer_lr=0.5)
    assert type(trainer) is GradDiff
    trainer.train()
    assert changed_outside(before, model, selection) == 0
    assert changed_inside(before, model, selection) > 0.8 * sum(p.numel() for p in sparse.trainable_parameters)
    assert isinstance(trainer.inner_optimizer, SparseAdamW)
    assert [group["layer_scale"] for group in trainer.inner_optimizer.param_groups] == pytest.approx([1, 0.5**0.5, 0.5])
    assert all(group["weight_decay"] == 0.1 for group in trainer.inner_optimizer.param_groups)
    assert [entry["skipped_steps"] for entry in trainer.state.log_history if "loss" in entry] == [0] * 4
    assert trainer.evaluate() == {"evaluated": 1.0}
    assert trainer.memory["optimizer_state"] == 2 * trainer.memory["gradients"]
    sparse.restore()
    assert not list(trainable_slices(model))


def test_restore_undoes_it(make_model, make_selection, make_foreign):
    """The trainer has the attributes and callbacks that it had, and trains every weight."""
    model = make_model()
    trainer = make_foreign(model)
    trainer.log = log = trainer.log  # one that somebody had set on the instance before
    names, callbacks = set(vars(trainer)), list(trainer.callback_handler.callbacks)
    for train in (False, True):
        sparse = attach(trainer, make_selection(model, units=3, forget=2))
        hooked = set(vars(trainer)) - names
        assert trainer.sparse is sparse and trainer.log is not log
        if train:
            trainer.train()
        sparse.restore()
        assert not hooked & set(vars(trainer)) and trainer.log is log
        assert trainer.callback_handler.callbacks == callbacks
    before = snapshot(model)
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    now = snapshot(model)
    assert not any(torch.equal(before[name], now[name]) for name, p in model.named_parameters() if p.dim() == 2)


def test_is_the_foreign_training(make_model, make_selection, make_foreign):
    """Losses and norms, step by step, of the foreign trainer without us and with masked gradients.

    Without weight decay, which moves weights outside a mask.
    """
    model = make_model()
    selection = make_selection(model)
    masked, own = copy.deepcopy(model), model
    for name, parameter in masked.named_parameters():
        mask = torch.zeros_like(parameter)
        for site in selection.sites:
            for part in site.slices:
                if part.parameter == name:
                    mask.index_fill_(part.dim, part.index(selection.units(site)), 1.0)
        parameter.requires_grad_(bool(mask.any()))
        if mask.any():
            parameter.register_hook(lambda grad, mask=mask: grad * mask)
    history = []
    for one in (masked, own):
        trainer = make_foreign(one, optim="adamw_torch")
        trainer.args.weight_decay = 0.0
        if one is own:
            attach(trainer, selection, layer_lr=1.0)
        trainer.train()
        history.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for theirs, ours in zip(*history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["learning_rate"] == theirs["learning_rate"]


def test_retain_passes_leave_forget_units_alone(make_model, make_selection, make_foreign):
    """As a trainer whose retain loss has no weight at all moves them; and the hooks are gone afterwards."""
    finals = []
    for alpha in (0.5, 0.0):
        model = make_model()
        trainer = make_foreign(model, max_steps=1, max_grad_norm=0.0)
        trainer.alpha = alpha
        sparse = attach(trainer, make_selection(model, units=3, forget=4))
        trainer.train()
        finals.append({(part.path, part.category): part.master().clone() for part in sparse.slices})
        sparse.restore()
        assert not model._forward_pre_hooks
    for (path, category), values in finals[0].items():
        assert torch.equal(values, finals[1][path, category]) == (category == "forget")


def test_resumes_to_the_same_bits(make_model, make_selection, make_foreign, tmp_path):
    finals = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-1")):
        model = make_model(torch.bfloat16)
        trainer = make_foreign(model, save_strategy="steps", save_steps=1)
        attach(trainer, make_selection(model, forget=2))
        trainer.train(resume_from_checkpoint=resume)
        finals.append(snapshot(model))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_refuses_what_cannot_be(make_model, make_selection, make_foreign):
    model = make_model()
    selection, forget = make_selection(model), make_selection(model, forget=2)
    trainer = make_foreign(model)
    with pytest.raises(SelectionError, match="belongs to the model"):
        attach(trainer, make_selection(make_model(seed=1)))
    dense = make_foreign(model, optimizers=(torch.optim.AdamW(model.parameters()), None))
    with pytest.raises(SparseError, match="has a AdamW already"):
        attach(dense, selection)
    with pytest.raises(SparseError, match="gradient checkpointing"):
        attach(make_foreign(model, gradient_checkpointing=True), forget)
    assert type(trainer) is GradDiff and not list(trainable_slices(model)) and not model._forward_pre_hooks
    attach(trainer, selection)
    with pytest.raises(SparseError, match="attach to it once"):
        attach(trainer, selection)
    trainer.sparse.restore()
    joined = make_foreign(model, Joined)
    attach(joined, forget)
    with pytest.raises(SparseError, match="neither of the forget nor of the retain inputs"):
        joined.train()


def test_refuses_another_optimizer_or_another_model(make_model, make_selection, make_foreign):
    model, other = make_model(), make_model()
    trainer = make_foreign(model)
    sparse = attach(trainer, make_selection(model))
    sparsify(other, make_selection(other))
    for wrong, message in (
        (torch.optim.AdamW(sparse.trainable_parameters), "AdamW would train master values"),
        (SparseAdamW(other), "trains another model"),
    ):
        trainer.optimizer = wrong
        before = snapshot(model)
        with pytest.raises(SparseError, match=message):
            trainer.train()
        assert all(torch.equal(before[name], now) for name, now in snapshot(model).items())
