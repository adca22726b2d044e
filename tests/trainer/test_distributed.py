"""Two processes, started by ``accelerate launch``: they train as one does, and send the selected gradients only."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import distributed

from clue_fast.errors import SparseError
from clue_fast.sparse import SparseAdamW, sparsify

pytestmark = pytest.mark.distributed


KINDS = ("plain", "checkpointing", "stages", "stochastic")


def launch(folder: Path, ranks: int, *kinds: str) -> dict[str, list[dict[str, Any]]]:
    """What every rank left of each kind of training, all in one launch."""
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        # The only launcher of accelerate that starts several processes without MPI; the script keeps to the CPU.
        command += ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes"]
        command += [str(ranks), "--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [str(Path(__file__).with_name("distributed_run.py")), str(folder), *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-4000:]
    found = {
        kind: [torch.load(path, weights_only=True) for path in sorted((folder / kind).glob("rank-*.pt"))]
        for kind in kinds
    }
    for entries in found.values():
        assert len(entries) == ranks and all(entry["ranks"] == ranks for entry in entries)
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return launch(tmp_path_factory.mktemp("one"), 1, *KINDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return launch(folder, 2, *KINDS)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(tensor, other["weights"][name]) for name, tensor in one["weights"].items())


@pytest.mark.parametrize("kind", KINDS)
def test_two_train_as_one(kind, one, two, folder):
    """To the rounding of float32 sums that are taken in another order, after Adam, which divides by small numbers.

    Where there are no masters, the weights are in float32, so that nothing is rounded at random.
    """
    (alone,), (first, second) = one[kind], two[kind]
    assert alone["steps"] == first["steps"] == (12 if kind == "stages" else 4)
    assert same(first, second)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for name, tensor in alone["weights"].items():
        assert (first["weights"][name] - tensor).abs().max() < 2e-5, name
    assert first["only_selected"] and second["only_selected"]
    if kind != "stages":
        assert first["sent"] == first["steps"] * first["selected"]
    assert 0 < first["sent"] <= first["steps"] * first["selected"]
    checkpoints = {path.name for path in (folder / kind / "run").iterdir()}
    assert checkpoints == {f"checkpoint-{step}" for step in range(2, first["steps"] + 1, 2)}


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.18"),
    reason="before transformers 5.18 a Trainer cannot resume in several processes on the CPU",
)
def test_two_resume_to_the_same_bits(two, folder):
    resumed = launch(folder, 2, "resume")["resume"]
    assert all(same(one, other) for one, other in zip(two["plain"], resumed, strict=True))


@pytest.fixture
def mesh(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_fsdp_of_torch_is_refused_whenever_it_comes(mesh, make_model, make_selection, make_batch):
    from torch.distributed.fsdp import fully_shard

    model, sharded = make_model(), make_model()
    selection = make_selection(model)
    fully_shard(sharded, mesh=mesh)
    with pytest.raises(SparseError, match=r"gate_proj.weight is sharded already .* after that with clue_fast.sparse"):
        sparsify(sharded, selection)
    sparsify(model, selection)
    optimizer = SparseAdamW(model)
    fully_shard(model, mesh=mesh)
    model(**make_batch()).loss.backward()
    with pytest.raises(
        SparseError, match=r"were replaced, as torch's fully_shard does; .*clue_fast.sparse.fully_shard"
    ):
        optimizer.step()
