"""Settings of a plan: those of ``localize`` and ``unlearn`` that decide on bytes and operations, and the machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clue_fast.config import LocalizeConfig, ModelConfig, RunConfig, UnlearnConfig
from clue_fast.config.schema import (
    ByKind,
    check_choices,
    is_number,
    positive,
    positive_integer,
    same_as,
    setting,
    switch,
)
from clue_fast.errors import SettingError
from clue_fast.selection import check_budget

DDP, FSDP2 = PARALLEL = ("ddp", "fsdp2")
MOST_GPUS = 64


def _size(text: str) -> int | bool:
    switches = {"true": True, "false": False}
    return switches[text.lower()] if text.lower() in switches else int(text)


def _sizes(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(size, int) for size in value.values()):
        raise SettingError(f"{name} {value} are not whole numbers by name, such as hidden_size=4096")


def _gpus(name: str, value: Any) -> None:
    if not (is_number(value) and 1 <= value <= MOST_GPUS and value == int(value)):
        raise SettingError(f"{name} {value} is not a whole number from 1 to {MOST_GPUS}")


@dataclass(frozen=True)
class PlanConfig(RunConfig):
    """What is planned, and on what.

    Records are taken to be ``max_length`` tokens long, so that what is planned is enough for those that are shorter.

    Attributes:
        sizes: of the configuration, in place of its own.
        criterion, kinds, layers, permutations, tokens_per_batch, target: see ``LocalizeConfig``.
        fraction: share of the units of every layer, or of those in ``layers``, that trains.
        objective, batch_size, retain_ratio, master_weights, lower_layers_gb: see ``UnlearnConfig``; a batch is that of
            one GPU.
        answer_tokens: how many tokens of a record are its answer; default all of them.
        forget_records, retain_records: how many there are to localize from, and to train on.
        gradient_checkpointing: keep the input of every layer only, and run it again in the backward pass.
        gpus: processes, one for each GPU.
        parallel: how they share the work: "ddp" (every GPU has the whole model) or "fsdp2" (each has a part of every
            weight).
        gpu_memory: of one GPU, in GiB; the plan says from how many GPUs on each way of training fits.
        lora_rank: of the adapters of all linear layers that stand beside.
        dtype, trust_remote_code: see ``ModelConfig``.
    """

    sizes: Mapping[str, Any] | None = setting(
        None,
        "sizes in place of those of the configuration: hidden_size=4096,num_hidden_layers=32",
        read=ByKind(_size),
        check=_sizes,
        metavar="NAME=N",
    )
    criterion: str = same_as(LocalizeConfig, "criterion")
    fraction: float | Mapping[str, float] | None = same_as(LocalizeConfig, "fraction")
    kinds: Iterable[str] | None = same_as(LocalizeConfig, "kinds")
    layers: tuple[float, float] | None = same_as(LocalizeConfig, "layers")
    target: str | None = same_as(LocalizeConfig, "target")
    permutations: int = same_as(LocalizeConfig, "permutations")
    tokens_per_batch: int = same_as(LocalizeConfig, "tokens_per_batch")
    objective: Any = same_as(UnlearnConfig, "objective")
    batch_size: int = same_as(UnlearnConfig, "batch_size")
    retain_ratio: int | None = same_as(UnlearnConfig, "retain_ratio")
    master_weights: bool = same_as(UnlearnConfig, "master_weights")
    lower_layers_gb: float = same_as(UnlearnConfig, "lower_layers_gb")
    answer_tokens: int | None = setting(
        None, "tokens of a record that are its answer (all)", read=int, check=positive_integer, metavar="N"
    )
    forget_records: int = setting(
        400, "records to forget, to localize from and to train on", read=int, check=positive_integer, metavar="N"
    )
    retain_records: int = setting(
        400, "records to keep, to localize from and to train on", read=int, check=positive_integer, metavar="N"
    )
    gradient_checkpointing: bool = setting(False, "keep the inputs of layers only, and run layers twice", check=switch)
    gpus: int = setting(1, f"from 1 to {MOST_GPUS}, a process each", read=int, check=_gpus, metavar="N")
    parallel: str = setting(DDP, "how several GPUs share a training", choices=PARALLEL, metavar="HOW")
    gpu_memory: float = setting(80.0, "of one GPU, in GiB", read=float, check=positive, metavar="GIB")
    lora_rank: int = setting(16, "of LoRA, which stands beside", read=int, check=positive_integer, metavar="R")
    dtype: str = same_as(ModelConfig, "dtype")
    trust_remote_code: bool = same_as(ModelConfig, "trust_remote_code")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.fraction)
        check_choices(self, "parallel", "dtype")
        if self.answer_tokens is not None and self.answer_tokens > self.max_length:
            raise SettingError(
                f"answer_tokens {self.answer_tokens} is more than the {self.max_length} tokens of a record (max_length)"
            )
        step = self.gpus * self.batch_size
        if step > self.forget_records:
            raise SettingError(
                f"gpus {self.gpus} with a batch_size of {self.batch_size} each take {step} forget records a step, and "
                f"there are {self.forget_records} (forget_records); take fewer"
            )
