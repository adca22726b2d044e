"""What runs a training or a localization on so many GPUs, how it is launched, and what is refused today."""

from __future__ import annotations

from dataclasses import dataclass

from clue_fast.config.planning import DDP

GPUS_PER_MACHINE = 8
"""With more GPUs there are several machines, as most have so many."""


@dataclass(frozen=True)
class Engine:
    """What runs it.

    Attributes:
        name: such as accelerate.
        launch: the line that starts it, on every machine; "" where nothing does.
        refused: why nothing does, or "".
    """

    name: str
    launch: str
    refused: str = ""


def _accelerate(gpus: int, script: str, *flags: str, precision: str = "no") -> str:
    machines = -(-gpus // GPUS_PER_MACHINE)
    several = ["--machine_rank", "RANK", "--main_process_ip", "ADDRESS", "--main_process_port", "29500"]
    words = ["accelerate launch", *flags, "--num_processes", str(gpus), "--num_machines", str(machines)]
    return " ".join([*words, *(several if machines > 1 else []), "--mixed_precision", precision, script])


def _torchrun(gpus: int, script: str) -> str:
    machines = next(n for n in range(-(-gpus // GPUS_PER_MACHINE), gpus + 1) if gpus % n == 0)  # as many on each
    several = ["--nnodes", str(machines), "--node_rank", "RANK", "--master_addr", "ADDRESS", "--master_port", "29500"]
    words = ["torchrun", "--nproc_per_node", str(gpus // machines), *(several if machines > 1 else []), script]
    return " ".join(words)


def training_engine(
    command: str | None, gpus: int, parallel: str, selects: bool, layer: str, precision: str = "no"
) -> Engine:
    """Says what trains.

    Args:
        command: that does it in one process, if there is one.
        gpus, parallel: see ``PlanConfig``.
        selects: whether selected units train, and not all weights or adapters.
        layer: class of the model's layers.
        precision: of the products, where it is not that of the weights.
    """
    if gpus == 1:
        plain = Engine("transformers.Trainer", "python train.py")
        return plain if command is None else Engine("clue_fast", command)
    if parallel == DDP:
        launch = _accelerate(gpus, "train.py", "--multi_gpu", precision=precision)
        return Engine("accelerate, DistributedDataParallel", launch)
    if selects:  # a Trainer would shard the weights itself, values of slices and all
        return Engine("clue_fast.sparse.fully_shard", _torchrun(gpus, "loop.py"))
    wrap = ["--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP", "--fsdp_transformer_layer_cls_to_wrap", layer]
    flags = ["--use_fsdp", "--fsdp_version", "2", *wrap, "--fsdp_reshard_after_forward", "true"]
    return Engine("accelerate, FSDP2", _accelerate(gpus, "train.py", *flags, precision=precision))


def localization_engine(command: str, gpus: int, parallel: str, criterion: str, live: bool) -> Engine:
    """Says what localizes.

    Args:
        command: that does it in one process.
        gpus, parallel, criterion: see ``PlanConfig``.
        live: whether a patched model records what the criterion needs in any pass.
    """
    if gpus == 1:
        return Engine("clue_fast", command)
    if not live:
        return Engine("clue_fast", "", f"one process alone measures the criterion {criterion!r}")
    return Engine(
        "clue_fast, DistributedDataParallel" if parallel == DDP else "clue_fast, FSDP2",
        _accelerate(gpus, "record.py", "--multi_gpu"),
    )
