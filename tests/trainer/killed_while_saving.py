"""Kills trainings while they save, resumes them and compares: ``killed_while_saving.py FOLDER KILLS``.

Prints how many of them ended with the same weights, bit for bit, as one that was left alone. Every run is a fork of
this process, which has imported everything and computed nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from clue_fast.selection import CONFLICT, Selection
from clue_fast.sites import find_sites, model_fingerprint
from clue_fast.trainer.checkpoints import STAGING
from clue_fast.trainer.trainer import UnlearnTrainer

STEPS, SAVE_STEPS = 12, 1


def make_trainer(folder: Path) -> UnlearnTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).to(torch.bfloat16)
    sites = find_sites(model)
    categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
    for values in categories.values():
        values[::8] = CONFLICT
    scores = {site: torch.zeros(site.width) for site in sites}
    generator = random.Random(0)
    examples = [[generator.randrange(3, 512) for _ in range(12)] for _ in range(32)]
    encoded = [{"input_ids": tokens, "labels": [-100] * 4 + tokens[4:]} for tokens in examples]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=SAVE_STEPS,
        save_total_limit=3,
        weight_decay=0.1,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        log_level="error",
    )
    return UnlearnTrainer(
        model,
        arguments,
        forget_dataset=encoded[:16],
        retain_dataset=encoded[16:],
        selection=Selection(sites, categories, scores, {}, model_fingerprint(model)),
    )


def train(folder: Path, result: Path, resume: str | None) -> None:
    """Trains in a fork, and leaves the weights and masters in a file."""
    trainer = make_trainer(folder)
    trainer.train(resume_from_checkpoint=resume)
    masters = {f"{part.path}.master": part.master() for part in trainer.sparse.slices}
    torch.save({**trainer.model.state_dict(), **masters}, result)


def fork(*arguments: Any) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        with contextlib.redirect_stdout(sys.stderr):
            train(*arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)


def finish(child: int) -> None:
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit("a training that was left alone failed")


def kill_while_saving(folder: Path, result: Path, moment: random.Random) -> bool:
    """Starts a training, and kills it at a random moment of a random save. Returns whether it was saving."""
    child = fork(folder, result, None)
    target, delay = moment.randrange(2, STEPS), moment.uniform(0.0, 0.03)
    staging = folder / STAGING
    deadline = time.monotonic() + 120
    while not (folder / f"checkpoint-{target - 1}").exists() or not staging.exists():
        if time.monotonic() > deadline or os.waitpid(child, os.WNOHANG)[0]:
            raise SystemExit("the training ended before it could be killed")
    time.sleep(delay)
    saving = staging.exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return saving


def equal(one: Path, other: Path) -> bool:
    first, second = (torch.load(path, weights_only=True) for path in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main(folder: Path, kills: int) -> None:
    finish(fork(folder / "whole", folder / "whole.pt", None))
    moment = random.Random(0)
    found = {"kills": 0, "during_save": 0, "equal": 0, "attempts": 0}
    while found["kills"] < kills and found["attempts"] < 20 * kills:
        found["attempts"] += 1
        run, result = folder / "killed", folder / "killed.pt"
        if not kill_while_saving(run, result, moment):
            shutil.rmtree(run)
            continue
        found["kills"] += 1
        found["during_save"] += 1
        finish(fork(run, result, get_last_checkpoint(str(run))))
        found["equal"] += equal(folder / "whole.pt", result)
        shutil.rmtree(run)
        result.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
