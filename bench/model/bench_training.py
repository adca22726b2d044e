"""A training step by five methods: time by phase, and bytes of gradients, optimizer state and saved activations.

One base point (5 % of the units in every layer, 4 x 256 tokens, float32, no checkpointing), and one axis varied at a
time rather than the full product. The methods take turns within a round (see `bench.interleaved`); all samples are kept
in bench/results/training.json. Every point is a case, some ten minutes altogether on two quiet cores.

full         every weight, torch's fused AdamW
full + mask  the same, with every gradient multiplied by a mask of the selected weights (as in SalUn, arXiv 2310.12508)
LoRA         peft, r = 16 on gate, up and down projection of the selected layers (arXiv 2106.09685)
SHiRA        peft, random single weights of the same modules, as many as ours trains (arXiv 2406.13175)
ours         clue_fast.sparsify and SparseAdamW on a patched model, as UnlearnTrainer has it
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from statistics import median

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import clue_fast
from bench import interleaved, machine
from bench.interleaved import Result, Target
from clue_fast.selection import CONFLICT, Selection
from clue_fast.sites import find_sites, model_fingerprint

LAYERS, WIDTH, UNITS, VOCABULARY = 8, 512, 1408, 4096
PHASES = ("forward", "backward", "optimizer")
MODULES = ["gate_proj", "up_proj", "down_proj"]
SECONDS = 35.0  # of sampling a point, about
ROUNDS = (7, 60)


@dataclass(frozen=True)
class Point:
    """One setting of everything that is varied."""

    name: str = "base"
    fraction: float = 0.05
    records: int = 4
    tokens: int = 256
    dtype: str = "float32"
    checkpointing: bool = False
    lowest: int = 0
    depth: int = LAYERS
    width: int = WIDTH

    @property
    def layers(self) -> list[int]:
        """The layers in which units are selected."""
        return list(range(self.lowest, self.depth))

    @property
    def units(self) -> int:
        """Of an MLP."""
        return self.width * UNITS // WIDTH


BASE = Point()
POINTS = [
    BASE,
    *(replace(BASE, name=f"fraction {fraction}", fraction=fraction) for fraction in (0.01, 0.1, 0.3)),
    replace(BASE, name="128 tokens", records=1, tokens=128),
    replace(BASE, name="bfloat16", dtype="bfloat16"),
    replace(BASE, name="checkpointing", checkpointing=True),
    replace(BASE, name="lowest layer L/2", lowest=LAYERS // 2),
    replace(BASE, name="lowest layer 3L/4", lowest=3 * LAYERS // 4),
]
ON_GPU = replace(BASE, name="8 x 1024 tokens, bfloat16", records=8, tokens=1024, dtype="bfloat16")
ALL_POINTS = [*POINTS, pytest.param(ON_GPU, marks=pytest.mark.gpu)]


def _now() -> float:
    machine.wait()
    return time.perf_counter()


@dataclass
class Method:
    """A model ready to train, its optimizer, and what happens to the gradients in between."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    mask: Callable[[], None] | None = None

    def step(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """Runs one step; returns seconds by phase. Masking belongs to the optimizer's."""
        start = _now()
        loss = self.model(**batch).loss
        forward = _now()
        loss.backward()
        backward = _now()
        self.update()
        end = _now()
        return {"forward": forward - start, "backward": backward - forward, "optimizer": end - backward}

    def update(self) -> None:
        if self.mask is not None:
            self.mask()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes(self, batch: dict[str, Tensor]) -> dict[str, int]:
        """Counts, tensor by tensor: what autograd saves in the forward beyond weights, gradients, optimizer state."""
        with saved_storages(self.model) as saved:
            loss = self.model(**batch).loss
        loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.update()
        state = [tensor for entry in self.optimizer.state.values() for tensor in entry.values()]
        return {
            "trained": sum(p.numel() for group in self.optimizer.param_groups for p in group["params"]),
            "gradients": gradients,
            "state": sum(tensor.nbytes for tensor in state if isinstance(tensor, Tensor)),
            "saved": sum(saved.values()),
        }


class saved_storages(torch.autograd.graph.saved_tensors_hooks):
    """Bytes by address of every storage that the graph keeps alive, except those of the model itself.

    A view keeps its whole storage. Under checkpointing this is what lasts from forward to backward, not what a
    recomputation holds for a moment.
    """

    def __init__(self, model: nn.Module) -> None:
        own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
                storage = part.untyped_storage()
                if storage.data_ptr() not in own:
                    self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    def __enter__(self) -> dict[int, int]:
        super().__enter__()
        return self.storages


def make_model(point: Point) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=point.width,
        intermediate_size=point.units,
        num_hidden_layers=point.depth,
        num_attention_heads=point.width // 64,
        num_key_value_heads=point.width // 64,
        use_cache=False,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # as from_pretrained does, which leaves the rotary buffers in float32
        parameter.data = parameter.data.to(getattr(torch, point.dtype))
    model.to(machine.device())
    if point.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_selection(model: nn.Module, point: Point) -> Selection:
    """Random units, the same share of each of the point's layers."""
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(0)
    categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
    for site in sites:
        if site.kind == "mlp" and site.layer in point.layers:
            chosen = torch.randperm(site.width, generator=generator)[: round(point.fraction * site.width)]
            categories[site][chosen] = CONFLICT
    scores = {site: torch.zeros(site.width) for site in sites}
    return Selection(sites, categories, scores, {"criterion": "random"}, model_fingerprint(model))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def full(model: LlamaForCausalLM, point: Point) -> Method:
    return Method(model, adamw(model))


def full_with_mask(model: LlamaForCausalLM, point: Point) -> Method:
    masks = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    selection = make_selection(model, point)
    for site in selection.sites:
        for part in site.slices:
            index = part.index(selection.units(site)).to(machine.device())
            masks[part.parameter].index_fill_(part.dim, index, 1.0)
    pairs = [(parameter, masks[name]) for name, parameter in model.named_parameters()]

    def mask() -> None:
        for parameter, kept in pairs:
            parameter.grad.mul_(kept)

    return Method(model, adamw(model), mask)


def lora(model: LlamaForCausalLM, point: Point) -> Method:
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, layers_to_transform=point.layers)
    adapted = peft.get_peft_model(model, config)
    return Method(adapted, adamw(adapted))


def shira(model: LlamaForCausalLM, point: Point) -> Method:
    # peft sizes SHiRA as LoRA of rank r: r (m + n) weights of an m x n matrix.
    r = max(1, round(point.fraction * point.width * point.units / (point.width + point.units)))
    names = [f"layers.{layer}.mlp.{module}" for layer in point.layers for module in MODULES]
    adapted = peft.get_peft_model(model, peft.ShiraConfig(r=r, target_modules=names, random_seed=0))
    return Method(adapted, adamw(adapted))


def ours(model: LlamaForCausalLM, point: Point) -> Method:
    clue_fast.sparsify(model, make_selection(model, point))
    clue_fast.patch(model)
    return Method(model, clue_fast.SparseAdamW(model, lr=1e-5))


METHODS: dict[str, Callable[[LlamaForCausalLM, Point], Method]] = {
    "full + mask": full_with_mask,
    "full": full,
    "LoRA": lora,
    "SHiRA": shira,
    "ours": ours,
}
TARGETS = (Target("ours", "full + mask", 0.60), Target("ours", "LoRA", 1.0))


@dataclass(frozen=True)
class Measurement:
    """Samples by phase and method, and bytes by method, of one point."""

    point: Point
    samples: dict[str, dict[str, list[float]]]
    bytes: dict[str, dict[str, int]]

    @property
    def steps(self) -> Result:
        """Whole steps: the sum of the phases, round by round."""
        sums = {
            method: [sum(times) for times in zip(*phases.values(), strict=True)]
            for method, phases in self.samples.items()
        }
        return Result(self.point.name, sums, targets=TARGETS)

    def table(self) -> str:
        point, steps = self.point, self.steps
        rounds = len(steps.samples["ours"])
        lines = [
            f"{point.name}: {point.fraction:.0%} of the units from layer {point.lowest} on, "
            f"{point.records} x {point.tokens} tokens, {point.dtype}, "
            f"checkpointing {'on' if point.checkpointing else 'off'} ({rounds} rounds; ms, MB)",
            f"  {'method':<12}{'trained':>11}{'forward':>9}{'backward':>10}{'optimizer':>11}{'step':>9}"
            f"{'gradients':>11}{'state':>8}{'saved':>8}  step over full + mask",
        ]
        for method, phases in self.samples.items():
            count = self.bytes[method]
            milliseconds = [1e3 * median(phases[phase]) for phase in PHASES] + [1e3 * median(steps.samples[method])]
            megabytes = [count[kind] / 1e6 for kind in ("gradients", "state", "saved")]
            lines.append(
                f"  {method:<12}{count['trained']:>11,}"
                + "".join(f"{value:>{width}.1f}" for value, width in zip(milliseconds, (9, 10, 11, 9), strict=True))
                + "".join(f"{value:>{width}.2f}" for value, width in zip(megabytes, (11, 8, 8), strict=True))
                + f"  {steps.ratio(method, 'full + mask')}"
            )
        for target in TARGETS:
            ratio = steps.ratio(target.case, target.against)
            lines.append(f"  step, {target.case} / {target.against}: {ratio}, {target.verdict(ratio)}")
        saved = self.bytes["ours"]["saved"] / self.bytes["LoRA"]["saved"]
        lines.append(f"  saved, ours / LoRA: {saved:.3f}, at most 1.000: {'met' if saved <= 1 else 'MISSED'}")
        return "\n".join(lines)


class Training:
    """Trains every method on the same batch, in turns.

    Attributes:
        rounds: how many fill the time, about.
        measurement: what is known so far.
    """

    def __init__(self, point: Point, seconds: float, methods: Iterable[str] = METHODS) -> None:
        model = make_model(point)
        self._methods = {name: METHODS[name](copy.deepcopy(model), point) for name in methods}
        tokens = torch.randint(VOCABULARY, (point.records, point.tokens), device=machine.device())
        self._batch = {"input_ids": tokens, "labels": tokens}
        counted = {name: method.bytes(self._batch) for name, method in self._methods.items()}
        once = sum(sum(method.step(self._batch).values()) for method in self._methods.values())
        self.rounds = min(max(round(seconds / once), ROUNDS[0]), ROUNDS[1])
        self._orders = itertools.cycle(interleaved.rounds_of(list(self._methods), len(self._methods)))
        samples: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in self._methods}
        self.measurement = Measurement(point, samples, counted)

    def round(self) -> None:
        """One step of every method."""
        for name in next(self._orders):
            for phase, seconds in self._methods[name].step(self._batch).items():
                self.measurement.samples[name][phase].append(seconds)


@pytest.mark.filterwarnings("ignore")  # what peft and transformers say of each other
@pytest.mark.parametrize("point", ALL_POINTS, ids=lambda point: point.name)
def bench_training(benchmark, keep, seconds: float | None, point: Point) -> None:
    training = Training(point, SECONDS if seconds is None else seconds)
    benchmark.group = f"training step, {point.name}"
    benchmark.pedantic(training.round, rounds=training.rounds)
    found = training.measurement
    model = {"layers": LAYERS, "width": WIDTH, "units": UNITS, "vocabulary": VOCABULARY}
    keep(asdict(found), found.table(), "points", about={"model": model}, ratios=found.steps.ratios())
