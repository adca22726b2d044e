"""One, two and four ranks train selected units of a model that FSDP2 shards, to the bits of one process.

Bit for bit, since every sum is taken in the same order: one process makes the passes of all ranks one after another,
each of a loss divided by their number, and accumulates gradients as the ranks add theirs up. A division by two or four
is exact, before the backward pass as after it; and a pass reads the same weights, in matrix products of the same shape.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clue_fast.config.planning import PlanConfig
from clue_fast.planning import plan
from clue_fast.sparse import SparseAdamW, sparsify
from tests.models.small_llama import llama, one_thread  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent))
from train_ranks import RANKS, STEPS, WAYS, result, run

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all ranks saved, which are started once, since it takes them as long to import as to train."""
    return start(tmp_path_factory.mktemp("ranks"), ",".join(map(str, RANKS)))


@pytest.fixture(scope="module", params=RANKS)
def ranks(request: pytest.FixtureRequest, saved: Path) -> tuple[int, Path]:
    """How many ranks there were, and the folder with what they saved."""
    return request.param, saved / str(request.param)


def start(folder: Path, *words: str) -> Path:
    """Runs ranks to their end; shows what a failing one wrote."""
    command = [sys.executable, str(SCRIPT), str(folder), *words]
    found = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return folder


def load(folder: Path, name: str, rank: int) -> Any:
    return torch.load(folder / f"{name} {rank}.pt", weights_only=True)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the weights and of the entries of the optimizer that have other bits."""
    assert one.keys() == other.keys()
    return [
        name for name, tensor in one.items() if not torch.equal(torch.as_tensor(tensor), torch.as_tensor(other[name]))
    ]


@pytest.mark.parametrize(("number", "name"), [(number, name) for number, names in RANKS.items() for name in names])
def test_ranks_train_as_one(number: int, name: str, saved: Path) -> None:
    folder = saved / str(number)
    model, _, optimizer = run(WAYS[name], number)
    alone = result(model, optimizer)
    for rank in range(number):
        found = load(folder, name, rank)
        weights = found["weights"]
        if WAYS[name].narrow:  # in float32, whose rounded values are gathered
            assert all(tensor.dtype == torch.float32 for tensor in weights.values())
            weights = {name: tensor.to(alone["weights"][name].dtype) for name, tensor in weights.items()}
        assert differences(weights, alone["weights"]) == []
        states = found["optimizer"]["state"], alone["optimizer"]["state"]
        assert states[0].keys() == states[1].keys() and len(states[0])
        for slices in states[0]:
            assert differences(states[0][slices], states[1][slices]) == []
        assert any(state.get("step") == STEPS for state in states[0].values())


@pytest.mark.slow
def test_ranks_whose_layers_are_compiled(tmp_path: Path) -> None:
    start(tmp_path, "2", "compiled")


def test_what_two_ranks_saved_goes_on_on_one(ranks: tuple[int, Path]) -> None:
    """The optimizer's state is whole, with weights, moments and steps, so that any number of ranks can load it."""
    number, folder = ranks
    found, way = load(folder, "bfloat16", 0), WAYS["bfloat16"]
    model, _, optimizer = run(way, number)
    later = way.model()
    sparsify(later, way.select(later))
    resumed = SparseAdamW(later, lr=1e-2, weight_decay=0.1)
    resumed.load_state_dict(found["optimizer"])
    for one, trained in ((model, optimizer), (later, resumed)):
        one(**way.batch(99)).loss.backward()
        trained.step()
    assert differences(result(later, resumed)["weights"], result(model, optimizer)["weights"]) == []


def test_every_rank_has_what_the_plan_says(ranks: tuple[int, Path], tmp_path: Path) -> None:
    """Four units of forty-eight in every layer, as many on each rank: to the byte."""
    number, folder = ranks
    llama(torch.bfloat16, tie_word_embeddings=True).config.save_pretrained(tmp_path)
    config = PlanConfig(gpus=number, parallel="fsdp2", fraction=4 / 48, max_length=16, dtype="bfloat16")
    planned = plan(str(tmp_path), config).trainings[0].footprint
    for rank in range(number):
        found = load(folder, "footprint", rank)
        for name in ("values", "original", "gradients", "optimizer_state"):
            assert found[name] == getattr(planned, name) > 0, name
        assert found["weights"] + found["buffers"] == planned.weights
