"""Writes the tables of docs/scale.md: what ``clue_fast.plan`` computes for shapes of one to seventy billion parameters.

Nothing is measured: configurations are turned into shapes, a few layers of which are run without data.

python -m bench.scale
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.files import ROOT, markdown_table, write_section
from clue_fast.config.planning import PlanConfig
from clue_fast.planning import Plan, Training, plan
from clue_fast.planning.table import GIB

PAGE = ROOT.parent / "docs" / "scale.md"
SECTION = "plans"
SHAPES = (
    "llama3-1b",
    "llama3-3b",
    "llama3-8b",
    "qwen3-14b",
    "qwen3-32b",
    "llama3-70b",
    "mixtral-8x7b",
    "qwen3-30b-a3b",
)
SETTINGS = {"batch_size": 1, "fraction": 0.01, "criterion": "attribution", "objective": "undial"}
GPUS = (1, 8, 64)
UPPER = (2 / 3, 1.0)


def upper_plans(shapes: Sequence[str] = SHAPES) -> dict[str, Plan]:
    """Each shape with units in its last third alone."""
    config = PlanConfig(layers=UPPER, lower_layers_gb=16.0, **SETTINGS)  # type: ignore[arg-type]
    return {name: plan(name, config) for name in shapes}


def plans(shapes: Sequence[str] = SHAPES) -> dict[str, tuple[Plan, Plan]]:
    """Each shape without and with gradient checkpointing."""
    made = {
        again: PlanConfig(gradient_checkpointing=again, **SETTINGS)  # type: ignore[arg-type]
        for again in (False, True)
    }
    return {name: (plan(name, made[False]), plan(name, made[True])) for name in shapes}


def table(head: str, rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(head.split(" | "), rows) + "\n"


def gib(size: int) -> str:
    """Two digits at the least."""
    found = size / GIB
    return f"{found:,.0f}" if found >= 10 else f"{found:.1f}" if found >= 1 else f"{found:.2f}"


def _size(found: Plan) -> str:
    active = f" ({found.active / 1e9:.1f})" if found.active != found.parameters else ""
    return f"{found.parameters / 1e9:.1f}{active}"


def memory_rows(found: Mapping[str, tuple[Plan, Plan]]) -> list[list[str]]:
    """Bytes on one GPU, part by part, and the peaks of all ways to train."""
    rows = []
    for name, (kept, again) in found.items():
        own = kept.trainings[0].footprint
        slices = own.values + own.original + own.gradients + own.optimizer_state
        cells = [own.weights, slices, own.activations, again.trainings[0].footprint.activations, own.logits]
        row = [name, _size(kept), *(gib(cell) for cell in cells)]
        row += [
            f"{gib(one.footprint.peak)} / {gib(other.footprint.peak)}"
            for one, other in zip(kept.trainings, again.trainings, strict=True)
        ]
        rows.append(row)
    return rows


def flop_rows(found: Mapping[str, tuple[Plan, Plan]]) -> list[list[str]]:
    """Operations of localization and of a step, with the bytes of statistics."""
    rows = []
    for name, (kept, again) in found.items():
        selected, whole, lora = (kept.trainings[place] for place in (0, 1, -1))
        steps = [selected, whole, lora, again.trainings[0]]
        row = [name, f"{kept.localization.flop / 1e15:,.1f}", gib(kept.localization.statistics)]
        row += [gib(kept.localization_footprint.peak), *(f"{one.flop / 1e12:,.0f}" for one in steps)]
        rows.append([*row, f"{selected.flop / whole.flop:.2f}", f"{selected.flop / lora.flop:.2f}"])
    return rows


def upper_rows(found: Mapping[str, tuple[Plan, Plan]], upper: Mapping[str, Plan]) -> list[list[str]]:
    """Units in the last third of the layers beside units in all of them: bytes, and operations of a step."""
    rows = []
    for name, own in upper.items():
        every, some = found[name][0].trainings[0], own.trainings[0]
        row = [name, gib(every.footprint.activations), gib(some.footprint.activations)]
        row += [gib(some.footprint.lower_layers), gib(every.footprint.peak), gib(some.footprint.peak)]
        row += [f"{flop / 1e12:,.0f}" for flop in (every.flop, some.flop, some.later_flop)]
        rows.append([*row, f"{some.later_flop / every.flop:.2f}"])
    return rows


def gpu_rows(found: Mapping[str, tuple[Plan, Plan]]) -> list[list[str]]:
    """The peak on one of several GPUs, with checkpointing, and from how many on it fits into 80 GiB."""
    rows = []
    for name, (_, again) in found.items():
        selected, whole, wide, lora = again.trainings
        row = [name]
        for one, way in ((selected, "ddp"), (selected, "fsdp2"), (whole, "fsdp2"), (wide, "fsdp2"), (lora, "fsdp2")):
            row.append(" / ".join(gib(one.peaks[way][gpus]) for gpus in GPUS))
        rows.append([*row, _fewest(selected, "ddp"), _fewest(whole, "fsdp2"), _fewest(lora, "fsdp2")])
    return rows


def _fewest(training: Training, way: str) -> str:
    gpus = training.fewest[way]
    return "none" if gpus is None else str(gpus)


def section(found: Mapping[str, tuple[Plan, Plan]], upper: Mapping[str, Plan]) -> str:
    """The tables."""
    gpus = " / ".join(map(str, GPUS))
    return "\n".join(
        [
            "Computed, not measured. One forget and four retain records of 512 tokens on each GPU, bfloat16 weights, "
            "1 % of the units of every layer, `undial`; localization from 400 + 400 records by `attribution`, in "
            "batches of 8. A second number behind a stroke is with gradient checkpointing.\n",
            "GiB on one GPU:\n",
            table(
                "model | billion parameters (active) | weights | slices: values, originals, gradients, moments | "
                "activations | with checkpointing | logits, at most | peak: selected units | all weights, bfloat16 | "
                "all weights, float32 | LoRA, r = 16",
                memory_rows(found),
            ),
            "Operations, and the memory of localization:\n",
            table(
                "model | PFLOP to localize | GiB of statistics | GiB at most | TFLOP a step: selected units | "
                "all weights | LoRA | selected, checkpointing | selected / all | selected / LoRA",
                flop_rows(found),
            ),
            "Units in the last third of the layers alone, whose lower layers run once for each record "
            "(`--layers 0.667:1 --lower-layers-gb 16`), beside units in all layers; GiB on one GPU, TFLOP a step:\n",
            table(
                "model | activations: all layers | last third | kept outputs of lower layers | peak: all layers | "
                "last third | a step: all layers | last third, first epoch | later epochs | later / all layers",
                upper_rows(found, upper),
            ),
            f"GiB at most on one of {gpus} GPUs, with checkpointing, and the fewest GPUs of 80 GiB that are enough "
            "(of 1, 2, 4, … 64):\n",
            table(
                "model | selected, DDP | selected, FSDP2 | all, bfloat16, FSDP2 | "
                "all, float32, FSDP2 | LoRA, FSDP2 | fewest: selected, DDP | all, bfloat16, FSDP2 | LoRA, FSDP2",
                gpu_rows(found),
            ),
        ]
    )


def main() -> None:
    """Writes the section."""
    write_section(PAGE, SECTION, section(plans(), upper_plans()))


if __name__ == "__main__":
    main()
