"""The training of a run, with the package's trainer and with one of somebody's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from clue_fast.config import UnlearnConfig
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.objectives import NPO
from clue_fast.trainer import UnlearnTrainer, train_selected


class Frozen(UnlearnTrainer):
    """Asks for no change at all."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * 0.0


@pytest.mark.parametrize("own", [False, True])
def test_a_run_trains_with_a_trainer_of_ones_own(own, make_model, make_selection) -> None:
    people = make_people(4, seed=1)
    sets = {"forget": records_of(people[:1]), "retain": records_of(people[1:])}
    tokenizer = train_tokenizer(sets["forget"] + sets["retain"], vocab_size=400)
    model = make_model(layers=1, vocab_size=len(tokenizer), max_position_embeddings=256)
    made: list[Any] = []

    def make(**settings: Any) -> UnlearnTrainer:
        made.append(settings)
        return Frozen(**settings)

    config = UnlearnConfig(learning_rate=1e-2, epochs=2, layer_lr=1.0, retain_ratio=1, max_length=64, progress=False)
    selection = make_selection(model)
    sparse, history = train_selected(
        model, tokenizer, sets, selection, NPO(), config, make_trainer=make if own else None
    )
    still = all(torch.equal(one.read(), one.original) for one in sparse.slices)
    assert still == own
    assert len(history) > 0
    if own:
        (settings,) = made
        assert (settings["model"], settings["selection"], settings["objective"]) == (model, selection, NPO())
