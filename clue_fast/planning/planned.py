"""What a localization and a training would take, from a configuration alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from clue_fast.config import RETAIN_RATIO, LocalizeConfig, ModelConfig, UnlearnConfig
from clue_fast.config.planning import FSDP2, PARALLEL, PlanConfig
from clue_fast.criteria.registry import Criterion, get_criterion
from clue_fast.errors import SettingError, SiteError, UnknownNameError
from clue_fast.internals import own_parameters
from clue_fast.objectives import Objective, get_objective
from clue_fast.objectives.base import default_objective
from clue_fast.planning.depth import Depth, find_depth, reduce_depth
from clue_fast.planning.engines import Engine, localization_engine, training_engine
from clue_fast.planning.localizing import Localization, check_measurement, trace_localization
from clue_fast.planning.methods import AllWeights, LowRank, Method, SelectedUnits
from clue_fast.planning.parallel import (
    Footprint,
    Kept,
    Weights,
    kept_of,
    localization_footprint,
    sent,
    training_footprint,
    weights_of,
)
from clue_fast.planning.shapes import find_config, make_model
from clue_fast.planning.step import Records, Step, trace_step
from clue_fast.planning.table import GIB, table
from clue_fast.selection import CONFLICT, Selection, check_budget, pools
from clue_fast.sites import HEAD_FAMILIES, KINDS, Survey, model_fingerprint, survey
from clue_fast.sites.experts import find_stack
from clue_fast.sparse.lower_layers import bytes_of

STEPS_OF_GPUS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Training:
    """One way to train.

    Attributes:
        name: of the way.
        selects: whether selected units train, and not all weights or adapters.
        trained: numbers that train.
        footprint: bytes on one GPU.
        forward_flop, backward_flop: operations of a step of the first epoch, on all GPUs together.
        later_forward_flop: those of the forward passes in later epochs, where what is kept of the records spares layers
            below the lowest one that trains, and the original model; otherwise as before.
        sent: bytes that each GPU sends in a step.
        engine: what runs it.
        peaks: the most bytes on one of so many GPUs, by the way they share the work.
        fewest: from how many GPUs on that fits; None where it does on none up to 64.
    """

    name: str
    selects: bool
    trained: int
    footprint: Footprint
    forward_flop: int
    backward_flop: int
    later_forward_flop: int
    sent: int
    engine: Engine
    peaks: Mapping[str, Mapping[int, int]]
    fewest: Mapping[str, int | None]

    @property
    def flop(self) -> int:
        """Operations of a step of the first epoch."""
        return self.forward_flop + self.backward_flop

    @property
    def later_flop(self) -> int:
        """Operations of a step of later epochs."""
        return self.later_forward_flop + self.backward_flop


@dataclass(frozen=True)
class Plan:
    """What a localization and a training would take. Computed from shapes; nothing was measured.

    Attributes:
        name: of the model.
        kind: its class.
        parameters: how many it has; what is tied counts once.
        active: of them, how many a token meets: of a mixture, those of the experts that it is sent to.
        dtype: of the weights.
        units, selected: how many there are, and how many are selected.
        config: what was asked for.
        objective: name of that of the training.
        records: of each set in a step on one GPU.
        localization: what it runs, on all GPUs together.
        localization_footprint: bytes on one GPU.
        localization_engine: what runs it.
        trainings: the selected units, and what stands beside.
    """

    name: str
    kind: str
    parameters: int
    active: int
    dtype: str
    units: int
    selected: int
    config: PlanConfig
    objective: str
    records: Mapping[str, int]
    localization: Localization
    localization_footprint: Footprint
    localization_engine: Engine
    trainings: tuple[Training, ...]

    def table(self) -> str:
        """Returns the plan as text."""
        return table(self)

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON holds it."""
        config = {one.name: getattr(self.config, one.name) for one in fields(self.config)}
        return {**asdict(replace(self, config=PlanConfig())), "config": {**config, "objective": self.objective}}


def plan(model: str | os.PathLike[str], config: PlanConfig | None = None) -> Plan:
    """Plans a localization and a training of a model, of which nothing but the configuration is read.

    Bytes are those of tensors. A GPU holds about one GiB more for its context and the workspace of libraries, and what
    the allocator cannot use. Records are taken to be padded to one length; all experts of a mixture to be given as many
    tokens. Operations are those of matrix products and attention, a multiplication and an addition being two.

    Args:
        model: a folder with a ``config.json``, a name of ``clue_fast.planning.SHAPES``, a kind of model in
            transformers, or "owner/name" on the hub.
        config: what is planned, and on what.

    Raises:
        UnknownNameError: there is no such architecture, criterion, kind of unit or objective.
        ModelError: the configuration cannot be read, or makes no causal language model.
        SiteError: nothing in the model can be selected.
        SettingError: the criterion, the objective or a kind of unit cannot be planned, or a size is none of the
            configuration.
        BudgetError: the fraction is outside (0, 1].
    """
    config = config or PlanConfig()
    criterion, objective = get_criterion(config.criterion), _objective(config.objective)
    check_measurement(criterion)
    kinds = _kinds(criterion, config)
    found_config = find_config(model, config.sizes, config.trust_remote_code)
    whole: Any = make_model(found_config, config.dtype, config.trust_remote_code)
    if config.gradient_checkpointing:
        # The name until transformers 5.24, which warns of it.
        enable = getattr(whole, "activation_checkpointing_enable", whole.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    depth = find_depth(whole)
    if config.layers is not None:
        depth = find_depth(whole, _part(whole, kinds, depth, config.layers))
    layer = type(depth.layers(whole)[0]).__name__ if depth.path else type(whole).__name__
    parameters = sum(p.numel() for p in whole.parameters())
    beside = _beside(whole.dtype, config.lora_rank)
    weights = {method.name: weights_of(whole, depth, method) for method in beside}
    plain = weights_of(whole, depth)
    active = _active(whole)
    reduce_depth(whole, depth)
    found = survey(whole, kinds)
    found.check()
    if config.layers is not None:
        found = replace(found, sites=tuple(site for site in found.sites if depth.trains(site.path)))
    selection = _selection(whole, found, config.fraction)
    every: list[Method] = [SelectedUnits(selection, found, config.master_weights), *beside]
    weights[every[0].name] = plain
    batch = max(1, config.tokens_per_batch // config.max_length)
    localization = trace_localization(
        whole,
        depth,
        found,
        criterion,
        _records(batch, config),
        config.forget_records,
        config.retain_records,
        config.permutations,
    )
    sets = _sets(objective, config)
    steps = {method: trace_step(whole, depth, method, objective, sets) for method in (*every, *_gathered(every))}
    name = os.fspath(model)
    trainings = tuple(
        _training(method, steps, weights[method.name], plain, objective, config, layer, name) for method in every
    )
    return Plan(
        name=name,
        kind=type(whole).__name__,
        parameters=parameters,
        active=active,
        dtype=str(whole.dtype).removeprefix("torch."),
        units=depth.total((site.path, site.width) for site in found.sites),
        selected=depth.total((site.path, len(selection.units(site))) for site in found.sites),
        config=config,
        objective=objective.name,
        records={name: records.number for name, records in sets.items()},
        localization=localization,
        localization_footprint=localization_footprint(localization, plain, config.gpus, config.parallel),
        localization_engine=localization_engine(
            _command("localize", name, config, LocalizeConfig, "selection.safetensors"),
            config.gpus,
            config.parallel,
            criterion.name,
            criterion.measurement.live,
        ),
        trainings=trainings,
    )


def _objective(given: Any) -> Objective:
    """The objective of a step. Raises UnknownNameError, or SettingError if it is none of likelihoods."""
    objective = default_objective() if given is None else get_objective(given)
    if type(objective).loss is not Objective.loss:
        raise SettingError(
            f"objective {objective.name!r} cannot be planned: it stops at a layer in between; plan one of likelihoods, "
            "such as npo"
        )
    return objective


def _kinds(criterion: Criterion, config: PlanConfig) -> tuple[str, ...]:
    """Kinds of units that train. Raises UnknownNameError, or SettingError for heads."""
    kinds = criterion.kinds if config.kinds is None else tuple(config.kinds)
    for kind in kinds:
        if kind not in KINDS:
            raise UnknownNameError("kind of site", kind, KINDS)
        if kind.startswith(HEAD_FAMILIES):
            raise SettingError(
                f"kinds {kind!r} cannot be planned: heads are found by running the model, and a plan has no weights to "
                "run; plan mlp and expert, or call estimate_memory on the model"
            )
    return kinds


def _part(model: Any, kinds: Iterable[str], depth: Depth, layers: tuple[float, float]) -> set[int]:
    """Numbers of the layers that train. Raises SiteError if there are none, or it is not known which."""
    found = survey(model, kinds)
    found.check()
    numbers = {depth.layer_of(site.path) for site in found.between(*layers).sites}
    if None in numbers:
        raise SiteError(f"{type(model).__name__} has units in no layer that is known; leave layers out")
    return {number for number in numbers if number is not None}


def _beside(dtype: torch.dtype, rank: int) -> list[Method]:
    """What people do otherwise: all weights, in their precision and, if that is less, in float32; and LoRA."""
    mixed: list[Method] = [] if dtype == torch.float32 else [AllWeights(dtype)]
    return [AllWeights(), *mixed, LowRank(rank)]


def _gathered(methods: Iterable[Method]) -> list[Method]:
    """The ways to train that run another step where FSDP2 gathers their weights in less precision."""
    return [replace(one, gathered=True) for one in methods if isinstance(one, AllWeights) and one.autocast]


def _active(model: Any) -> int:
    """How many parameters a token meets."""
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    idle = 0
    for module in model.modules():
        stack = find_stack(module)
        if stack is not None and chosen:
            own = sum(parameter.numel() for parameter in own_parameters(module).values())
            idle += own * (stack.experts - min(chosen, stack.experts)) // stack.experts
    parameters: int = sum(p.numel() for p in model.parameters())
    return parameters - idle


def _selection(model: Any, found: Survey, fraction: Any) -> Selection:
    """The share of the units of every site; which of them does not matter."""
    budget, value = check_budget(fraction)
    categories = {}
    for sites, number in pools(found.sites, budget, value, "layer"):
        for site in sites:
            categories[site] = torch.zeros(site.width, dtype=torch.int8, device="cpu")
            categories[site][:number] = CONFLICT
    scores = {site: torch.zeros(site.width, device="cpu") for site in found.sites}
    return Selection(found.sites, categories, scores, {}, model_fingerprint(model))


def _records(number: int, config: PlanConfig) -> Records:
    return Records(number, config.max_length, config.answer_tokens or config.max_length)


def _sets(objective: Objective, config: PlanConfig) -> dict[str, Records]:
    """The records of a step on one GPU, by the names of the objective."""
    retain = config.batch_size * (RETAIN_RATIO if config.retain_ratio is None else config.retain_ratio)
    sets = {name: _records(config.batch_size, config) for name in objective.forget_batches}
    return {**sets, "retain": _records(retain, config)} if objective.retain_weight else sets


def _all_records(objective: Objective, config: PlanConfig) -> dict[str, int]:
    """How many records there are in all, by the names of the objective."""
    found = dict.fromkeys(objective.forget_batches, config.forget_records)
    return {**found, "retain": config.retain_records} if objective.retain_weight else found


def _training(
    method: Method,
    steps: Mapping[Method, Step],
    weights: Weights,
    plain: Weights,
    objective: Objective,
    config: PlanConfig,
    layer: str,
    name: str,
) -> Training:
    asks = bool(objective.original_batches)
    (gathered,) = _gathered([method]) or [method]
    step, narrow = steps[method], 1 if gathered is method else 2

    selects = isinstance(method, SelectedUnits)

    def kept(gpus: int, parallel: str) -> Kept:
        """No layer is skipped where FSDP2 shards it."""
        most = 0 if parallel == FSDP2 and gpus > 1 else bytes_of(config.lower_layers_gb)
        return kept_of(step, _all_records(objective, config), most) if selects else Kept()

    def footprint(gpus: int, parallel: str) -> Footprint:
        own, times = (steps[gathered], narrow) if parallel == FSDP2 and gpus > 1 else (step, 1)
        copies, of_records = method.copies_original, kept(gpus, parallel)
        return training_footprint(own, weights, plain, gpus, parallel, asks, copies, times, of_records)

    later = kept(config.gpus, config.parallel)
    peaks = {way: {gpus: footprint(gpus, way).peak for gpus in STEPS_OF_GPUS} for way in PARALLEL}
    command = _command("unlearn", name, config, UnlearnConfig, "unlearned") if selects else None
    autocast = getattr(method, "autocast", None)
    return Training(
        name=method.name,
        selects=selects,
        trained=step.depth.total((one.path, one.numbers) for one in step.trained),
        footprint=footprint(config.gpus, config.parallel),
        forward_flop=step.forward_flop * config.gpus,
        backward_flop=step.backward_flop * config.gpus,
        later_forward_flop=step.later_forward_flop(later.lower_known, later.asked) * config.gpus,
        sent=sent(step, weights, config.gpus, config.parallel, narrow),
        engine=training_engine(
            None if config.gradient_checkpointing else command,
            config.gpus,
            config.parallel,
            selects,
            layer,
            {None: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[autocast],
        ),
        peaks=peaks,
        fewest={
            way: next((gpus for gpus, peak in by_gpus.items() if peak <= config.gpu_memory * GIB), None)
            for way, by_gpus in peaks.items()
        },
    )


def _command(name: str, model: str, config: PlanConfig, kind: type, output: str) -> str:
    """The command that does what is planned, with the settings that are not its defaults."""
    loadable = Path(model).is_dir() or "/" in model  # a shape by its name is no model that could be loaded
    words = [
        "clue-fast",
        name,
        model if loadable else "MODEL",
        "--forget",
        "FORGET",
        "--retain",
        "RETAIN",
        "--output",
        output,
    ]
    shared = {one.name for one in (*fields(kind), *fields(ModelConfig))}
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name not in shared or value == one.default or one.name == "progress":
            continue
        flag = one.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, Mapping):
            words += [f"--{flag}", ",".join(f"{key}={own}" for key, own in value.items())]
        elif isinstance(value, str | int | float):
            words += [f"--{flag}", str(value)]
        elif one.name == "layers":
            words += [f"--{flag}", ":".join(f"{share:g}" for share in value)]
        elif isinstance(value, Iterable):
            words += [f"--{flag}", ",".join(map(str, value))]
    return " ".join(words)
