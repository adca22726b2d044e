"""A plan as a table: bytes on one GPU, operations, and what runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clue_fast.config.planning import PARALLEL
from clue_fast.tables import aligned

if TYPE_CHECKING:
    from clue_fast.config.planning import PlanConfig
    from clue_fast.planning.planned import Plan, Training

GIB, TERA = 2**30, 1e12
ROWS = {
    "weights": "weights",
    "reference": "copy of the original model",
    "values": "values of slices, adapters",
    "original": "slices as they were",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "lower_layers": "kept: outputs of lower layers",
    "original_outputs": "kept: outputs of the original",
    "statistics": "statistics",
    "communication": "buckets, whole layers",
    "activations": "activations",
    "logits": "logits, at most",
    "peak": "peak",
}
"""What there is on a GPU, and what the table calls it."""


def table(plan: Plan) -> str:
    """Returns a plan as text."""
    config = plan.config
    share = plan.selected / plan.units
    active = f" ({plan.active / 1e9:,.2f} billion active)" if plan.active != plan.parameters else ""
    lines = [
        f"{plan.name}: {plan.kind}, {plan.parameters / 1e9:,.2f} billion parameters{active}, {plan.dtype}",
        f"{plan.selected:,} of {plan.units:,} units selected ({share:.2%}), the same share of {_layers(config)}",
        "computed from shapes, not measured",
        "",
        f"localize: {config.criterion}, {config.forget_records:,} + {config.retain_records:,} records of "
        f"{config.max_length} tokens",
        f"train: {plan.objective}, {' + '.join(f'{n} {name}' for name, n in plan.records.items())} records of "
        f"{config.max_length} tokens on {_gpus(config.gpus, config.parallel)}"
        + (", layers run twice (checkpointing)" if config.gradient_checkpointing else ""),
        "",
        *aligned([["GiB on one GPU", "localize", *(one.name for one in plan.trainings)], *_bytes(plan)]),
        "",
        *aligned([["TFLOP, all GPUs", "localize", *(f"{one.name}, a step" for one in plan.trainings)], *_flop(plan)]),
        "",
        *aligned([["", *(one.name for one in plan.trainings)], *_fits(plan)]),
        "",
        *_launches(plan),
    ]
    return "\n".join(lines)


def _gpus(gpus: int, parallel: str) -> str:
    return "one GPU" if gpus == 1 else f"each of {gpus} GPUs, {parallel}"


def _bytes(plan: Plan) -> list[list[str]]:
    footprints = [plan.localization_footprint, *(one.footprint for one in plan.trainings)]
    return [
        [title, *(gib(getattr(one, name)) if getattr(one, name) else "" for one in footprints)]
        for name, title in ROWS.items()
        if any(getattr(one, name) for one in footprints)
    ]


def gib(size: int) -> str:
    """Returns bytes in GiB, as text."""
    found = size / GIB
    return f"{found:,.2f}" if found >= 1 else f"{found:.3f}"


def _flop(plan: Plan) -> list[list[str]]:
    parts = {"forward": "forward_flop", "backward": "backward_flop", "together": "flop"}
    rows = [
        [title, "", *(f"{getattr(one, name) / TERA:,.2f}" for one in plan.trainings)] for title, name in parts.items()
    ]
    rows[-1][1] = f"{plan.localization.flop / TERA:,.2f}"
    if all(one.later_flop == one.flop for one in plan.trainings):
        return rows
    return [*rows, ["in later epochs", "", *(f"{one.later_flop / TERA:,.2f}" for one in plan.trainings)]]


def _layers(config: PlanConfig) -> str:
    if config.layers is None:
        return "every layer"
    begin, end = config.layers
    return f"every layer from {begin:g} to {end:g} of the depth"


def _fits(plan: Plan) -> list[list[str]]:
    limit = plan.config.gpu_memory
    rows = [
        [f"fits into {limit:g} GiB each, {parallel}, from", *(_fewest(one, parallel) for one in plan.trainings)]
        for parallel in PARALLEL
    ]
    if plan.config.gpus > 1:
        rows.append(["GiB sent by each in a step", *(gib(one.sent) for one in plan.trainings)])
    return rows


def _fewest(training: Training, parallel: str) -> str:
    gpus = training.fewest[parallel]
    return "none" if gpus is None else f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs"


def _launches(plan: Plan) -> list[str]:
    found = []
    for name, engine in [
        ("localize", plan.localization_engine),
        *((one.name, one.engine) for one in plan.trainings),
    ]:
        if engine.refused:
            found.append(f"{name}: refused today by {engine.name}: {engine.refused}")
        else:
            found.append(f"{name} ({engine.name}): {engine.launch}")
    scripts = [script for script in SCRIPTS if any(script in line for line in found)]
    return [*found, *(f"{script} {SCRIPTS[script]}" for script in scripts)]


SCRIPTS = {
    "train.py": "is yours: it makes the trainer, an UnlearnTrainer where selected units train, and calls train()",
    "loop.py": "is yours: it calls sparsify, clue_fast.sparse.fully_shard on each layer and on the model, and steps "
    "SparseAdamW",
    "record.py": "is yours: it records its share of the data with clue_fast.patch, and calls statistics.all_reduce()",
}
"""What launch lines start that this package does not bring."""
