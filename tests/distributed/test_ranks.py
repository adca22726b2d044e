"""Two ranks record what one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clue_fast.statistics import Statistics

sys.path.insert(0, str(Path(__file__).parent))
from record_ranks import WAYS, record

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("record_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved; shows what a failing one wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder)],
            env=os.environ | shared | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_record_what_one_does(way: str, folder: Path) -> None:
    first, second = (Statistics.load(folder / f"{way} {rank}.safetensors") for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.tensors(), second.tensors(), strict=True))
    alone = record("alone", 0, 1)
    assert set(first.sites) <= set(alone.sites)
    assert len(first.sites) == (2 if way == "shard, then patch" else 6)
    for site in first.sites:
        for tensor in ("values", "gradient_values"):
            found = getattr(first, tensor)[0, :, first.units(site)]
            expected = getattr(alone, tensor)[0, :, alone.units(site)]
            scale = expected.abs().amax(-1, keepdim=True)
            assert bool(((found - expected).abs() <= 1e-5 * scale).all()), (site.name, tensor)
        assert int(first.count[0, first.number(site)]) == int(alone.count[0, alone.number(site)])
