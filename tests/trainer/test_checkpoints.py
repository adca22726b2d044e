"""Checkpoints are whole or not there; the best one is found and loaded; a killed run resumes to the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.trainer_utils import get_last_checkpoint

from clue_fast.sparse import changed_inside, changed_outside, snapshot
from clue_fast.trainer import UnlearnTrainer
from clue_fast.trainer.checkpoints import STAGING


@pytest.fixture
def make_saving(make_model, make_selection, make_arguments, make_examples):
    def make(model: Any = None, **settings: Any) -> UnlearnTrainer:
        model = make_model(torch.bfloat16) if model is None else model
        return UnlearnTrainer(
            model,
            make_arguments(save_strategy="steps", save_steps=2, num_train_epochs=3, **settings),
            forget_dataset=make_examples(8, seed=1),
            retain_dataset=make_examples(8, seed=2),
            eval_dataset=make_examples(4, seed=3),
            selection=make_selection(model),
        )

    return make


def folders(trainer: UnlearnTrainer) -> list[str]:
    return sorted(path.name for path in Path(trainer.args.output_dir).iterdir())


def test_a_checkpoint_appears_when_it_is_whole(make_saving, monkeypatch):
    """A run that dies while it saves leaves what was there before, and the next run clears up."""
    trainer = make_saving()
    saved: list[list[str]] = []
    save = UnlearnTrainer._save_rng_state

    def die(self: Any, output_dir: str) -> None:
        saved.append(folders(trainer))
        if len(saved) == 3:
            raise KeyboardInterrupt
        save(self, output_dir)

    monkeypatch.setattr(UnlearnTrainer, "_save_rng_state", die)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert saved == [[STAGING], [STAGING, "checkpoint-2"], [STAGING, "checkpoint-2", "checkpoint-4"]]
    assert folders(trainer) == [STAGING, "checkpoint-2", "checkpoint-4"]
    assert get_last_checkpoint(trainer.args.output_dir).endswith("checkpoint-4")
    again = make_saving()
    again.train(resume_from_checkpoint=True)
    assert folders(again) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_only_so_many_are_kept_and_one_may_be_replaced(make_saving):
    trainer = make_saving(save_total_limit=2)
    trainer.train()
    assert folders(trainer) == ["checkpoint-4", "checkpoint-6"]
    before = (Path(trainer.args.output_dir) / "checkpoint-6" / "optimizer.pt").stat().st_mtime_ns
    trainer = make_saving(save_total_limit=1)
    trainer.train()
    assert folders(trainer) == ["checkpoint-6"]
    assert (Path(trainer.args.output_dir) / "checkpoint-6" / "optimizer.pt").stat().st_mtime_ns > before


@pytest.mark.parametrize(("best", "kept"), [(2, [2, 6]), (6, [4, 6])])
def test_loads_the_best_model(best, kept, make_model, make_saving, monkeypatch):
    """By a metric that is best at a certain step; masters follow, and the state on disk says where it is.

    Of older checkpoints, the best is the last to be deleted.
    """
    model = make_model(torch.bfloat16)
    before = snapshot(model)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "m"}
    settings["save_total_limit"] = 2
    trainer = make_saving(model, **settings, greater_is_better=True, learning_rate=1e-2)
    at_best: dict[str, torch.Tensor] = {}

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        step = trainer.state.global_step
        if step == best:
            at_best.update(snapshot(model))
        return {"eval_m": float(step == best)}

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    trainer.train()
    folder = Path(trainer.args.output_dir) / f"checkpoint-{best}"
    assert folders(trainer) == [f"checkpoint-{step}" for step in kept]
    assert trainer.state.best_model_checkpoint == str(folder)
    assert json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"] == str(folder)
    assert all(torch.equal(at_best[name], now) for name, now in snapshot(model).items())
    for part in trainer.sparse.slices:
        assert torch.equal(part.values.detach(), part.read().float())
    assert changed_outside(before, model, trainer.sparse.selection) == 0
    assert changed_inside(before, model, trainer.sparse.selection) > 0


@pytest.mark.slow
def test_killed_while_saving_resumes_to_the_same_bits(tmp_path):
    """SIGKILL at random moments of a save: the last whole checkpoint loads, and the run ends as if nothing was.

    How often: CLUE_FAST_KILLS, 2 by default.
    """
    kills = os.environ.get("CLUE_FAST_KILLS", "2")
    script = Path(__file__).with_name("killed_while_saving.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, script, tmp_path, kills], env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.strip().splitlines()[-1])
    assert found["kills"] == found["equal"] == int(kills)
    assert found["during_save"] == int(kills)
