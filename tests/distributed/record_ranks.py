"""One rank: records its share of the batches in every way, and saves the statistics of all ranks together.

python record_ranks.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torch.distributed wants them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))
import clue_fast
from clue_fast.errors import PatchError, SelectionError
from tests.models.families import make_batch, make_model

BATCHES = 6
KINDS = ("mlp", "expert", "attention")
WAYS = ("alone", "ddp", "patch, then shard", "shard, then patch")


def batches(rank: int, ranks: int) -> list[dict[str, torch.Tensor]]:
    """The batches of one rank."""
    return [make_batch("llama", seed=seed) for seed in range(rank, BATCHES, ranks)]


def shard(model: Any) -> None:
    """FSDP2: every layer by itself, and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def record(way: str, rank: int, ranks: int) -> clue_fast.Statistics:
    """Statistics of the batches of all ranks."""
    model, wrapped = make_model("llama"), None
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    if way == "shard, then patch":
        shard(model)
    kinds = KINDS if way != "shard, then patch" else ("mlp",)
    patched = clue_fast.patch(model if wrapped is None else wrapped, kinds=kinds)
    if way == "patch, then shard":
        shard(model)
    forward: nn.Module = model if wrapped is None else wrapped
    with patched.record("forget", gradients=True):
        for batch in batches(rank, ranks):
            forward(**batch).loss.backward()
    if ranks > 1:
        patched.statistics.all_reduce()
    statistics = patched.statistics
    patched.unpatch()
    return statistics


def refuse(rank: int) -> None:
    """Ranks that recorded different groups cannot be added up, and all of them say so."""
    patched = clue_fast.patch(make_model("llama"))
    with patched.record(f"only on {rank}"):
        pass
    try:
        patched.statistics.all_reduce()
    except SelectionError as error:
        assert "only on 1" in str(error)
    else:
        raise AssertionError("statistics of different groups were added up")


def refuse_tensor_parallel() -> None:
    """Activations that are spread over ranks are refused by name, and the model stays usable."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for local in (False, True):
        model = make_model("llama")
        plan = {name: ColwiseParallel(use_local_output=local) for name in ("gate_proj", "up_proj")}
        parallelize_module(model.model.layers[1].mlp, mesh, plan)
        patched = clue_fast.patch(model)
        expected = "has 48 units of 1 channels, but its activations have 24" if local else "computes on a DTensor"
        with patched.record("forget"):
            try:
                model(**make_batch("llama"))
            except PatchError as error:
                assert "model.layers.1.mlp" in str(error), error
                assert expected in str(error), error
            else:
                raise AssertionError("activations spread over ranks were recorded")
        patched.unpatch()


def main() -> None:
    """Runs one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for way in WAYS:
        record(way, rank, dist.get_world_size()).save(Path(sys.argv[1]) / f"{way} {rank}.safetensors")
    refuse(rank)
    refuse_tensor_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    # Done: a thread of gloo that asks for the interpreter while it ends would abort the process.
    sys.stdout.flush()
    os._exit(0)
