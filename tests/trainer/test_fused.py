"""While a trainer trains, MLPs keep gate and up for the backward, and nothing else as wide."""

from __future__ import annotations

import pytest
import torch

import clue_fast
from clue_fast.trainer.trainer import UnlearnTrainer

UNITS = 48  # of an MLP


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Tensors of the width of an MLP that a forward keeps, by address."""

    def __init__(self) -> None:
        self.found: set[int] = set()

        def pack(tensor):
            if tensor.dim() > 1 and tensor.shape[-1] == UNITS and tensor.shape[0] != 32:  # not the weight of down
                self.found.add(tensor.untyped_storage().data_ptr())
            return tensor

        super().__init__(pack, lambda tensor: tensor)


@pytest.fixture
def trainer(make_model, make_selection, make_examples, make_arguments):
    model = make_model()
    return UnlearnTrainer(
        model,
        make_arguments(num_train_epochs=2, max_steps=2),
        forget_dataset=make_examples(8, seed=1),
        retain_dataset=make_examples(8, seed=2),
        selection=make_selection(model),
        objective="gradient_difference",
    )


def test_two_tensors_a_layer(trainer, one_pass, monkeypatch):
    kept = []
    compute = UnlearnTrainer.compute_loss

    def watched_loss(self, *args, **kwargs):
        hooks = Kept()
        with hooks:
            loss = compute(self, *args, **kwargs)
        kept.append(len(hooks.found))
        return loss

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", watched_loss)
    trainer.train()
    assert kept == [2 * 3, 2 * 3]  # gate and up of three layers
    kept.clear()
    batch = next(iter(trainer.get_train_dataloader()))
    watched_loss(trainer, trainer.model, batch)
    assert kept == [3 * 3]  # outside of train, also what the activation gives


def test_the_model_comes_back(trainer):
    before = {name: type(module) for name, module in trainer.model.named_modules()}
    trainer.train()
    assert {name: type(module) for name, module in trainer.model.named_modules()} == before
    assert trainer.patched is None


def test_also_after_an_error(trainer, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no more")

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="no more"):
        trainer.train()
    clue_fast.patch(trainer.model).unpatch()


def test_a_patched_model_stays_patched(trainer):
    with clue_fast.patch(trainer.model) as patched:
        trainer.train()
        assert "gated_activation" in str(patched.report())
