"""Every way to unlearn that a grid can name: which units it selects, and what it trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from itertools import count, islice
from operator import or_
from typing import Any

import torch
from torch import nn

import clue_fast
from bench.unlearning.grid import Grid, Method, Run
from bench.unlearning.positions import at_subjects
from bench.unlearning.staying import trainer_of
from clue_fast.config import WARMUP, LocalizeConfig, UnlearnConfig
from clue_fast.criteria import criterion
from clue_fast.criteria.registry import get_criterion
from clue_fast.data import Collator, Record, padding_token
from clue_fast.localization import localize_records
from clue_fast.objectives import Objective, get_objective
from clue_fast.selection import Selection
from clue_fast.sparse import owned_weights
from clue_fast.trainer.pairing import Pair, PairCollator, PairSampler, encode_pairs
from clue_fast.trainer.stages import Stage, get_schedule, get_stages, make_stages, scheduled_objective
from clue_fast.trainer.training import train_selected
from clue_fast.trainer.update_scale import teaches_answers

FLOOR = 1e-12
RATE = 1.2
ROUND_SEED = 100_000


def attribution_ratio(measured: Any) -> torch.Tensor:
    """E_forget|p| / E_retain|p|

    Source: importance to forget over importance to retain, after selective synaptic dampening, arXiv 2308.07707.
    """
    return measured.forget.abs_attribution / (measured.retain.abs_attribution + FLOOR)


def unit_of_rates(model: Any) -> float:
    """What the rates of a grid are multiples of: 1.2 / width."""
    return RATE / float(model.get_input_embeddings().weight.shape[-1])


def register_criteria() -> None:
    """Makes the criteria known that only grids ask for."""
    criterion(needs="gradients", target="log_odds", importance=lambda units: units.abs_attribution)(attribution_ratio)


def unlearn(model: Any, tokenizer: Any, sets: dict[str, list[Record]], run: Run, grid: Grid) -> int:
    """Trains a model in place, by the method of a run, and returns how many of its weights did."""
    if run.method.train == "nothing":
        return zero(model, select_units(model, tokenizer, sets, run))
    if run.method.train != "units":
        return train_dense(model, tokenizer, sets, run, grid)
    selections = []
    for number, steps in enumerate(shares(grid.steps, run.method.rounds)):
        part = replace(run, seed=run.seed + ROUND_SEED * number)
        selections.append(select_units(model, tokenizer, sets, part))
        train_units(model, tokenizer, sets, selections[-1], steps, part, grid)
    return owned_weights(model, reduce(or_, selections))


def train_units(
    model: Any,
    tokenizer: Any,
    sets: dict[str, list[Record]],
    selection: Selection,
    steps: int,
    run: Run,
    grid: Grid,
) -> None:
    """Trains the selected units in place, by the method of a run."""
    method = run.method
    config = UnlearnConfig(
        learning_rate=run.rate * unit_of_rates(model),
        epochs=steps * grid.batch / len(sets["forget"]),
        batch_size=grid.batch,
        retain_ratio=grid.retain_ratio,
        layer_lr=method.layer_lr,
        seed=run.random_seed,
        progress=False,
    )
    stages = None if method.stages is None else stages_of(method, selection, config.epochs)
    with noisy_inputs(model, method.noise, run.random_seed):
        sparse, _ = train_selected(
            model,
            tokenizer,
            sets,
            selection,
            objective_of(method),
            config,
            stages=stages,
            make_trainer=trainer_of(method),
        )
    sparse.restore()


def stages_of(method: Method, selection: Selection, epochs: float | None) -> list[Stage]:
    """The stages of a schedule for which there are units, as much longer as all of them are to be together.

    Raises:
        ValueError: so many epochs are no multiple of those that were published.
    """
    assert method.stages is not None and epochs is not None
    objective = objective_of(method)
    published = sum(stage.epochs for stage in make_stages(method.stages, objective))
    if epochs <= 0 or epochs % published:
        raise ValueError(f"the schedule {method.stages} has {published} epochs; {epochs:g} are no multiple of these")
    stages = get_stages(method.stages, objective, selection)
    return [replace(stage, epochs=stage.epochs * int(epochs // published)) for stage in stages]


def shares(steps: int, rounds: int) -> list[int]:
    """Steps of each round, the same number but for one. Raises ValueError if there are fewer steps than rounds."""
    if not 1 <= rounds <= steps:
        raise ValueError(f"{steps} steps are too few for {rounds} rounds")
    return [steps // rounds + (number < steps % rounds) for number in range(rounds)]


def objective_of(method: Method) -> Objective:
    """The loss of a method."""
    if method.objective is None:
        return scheduled_objective(None, get_schedule(method.stages))
    return get_objective(method.objective, **method.parameters)


def select_units(model: Any, tokenizer: Any, sets: dict[str, list[Record]], run: Run) -> Selection:
    """The units of a method, with the budget of the run."""
    method = run.method
    begin, end = (round(share * model.config.num_hidden_layers) for share in method.layers)
    share = run.budget * model.config.num_hidden_layers / (end - begin)
    wide = min(1.0, share * (3 if method.halves else 1))

    settings: dict[str, Any] = {
        "criterion": method.criterion,
        "fraction": wide,
        "scope": method.scope,
        "categories": method.categories,
        "target": method.target,
        "kinds": method.kinds,
        "permutations": 0,
        "seed": run.random_seed,
        "progress": False,
    }

    def localize(records: Sequence[Record]) -> Selection:
        if method.positions == "answer":
            return clue_fast.localize(model, list(records), sets["retain"], tokenizer=tokenizer, **settings)
        if get_criterion(method.criterion).measurement.counts != "token":
            raise ValueError(f"{method.criterion} measures whole records; it cannot be asked of a subject's token")
        read = {name: at_subjects(own, tokenizer) for name, own in (("forget", records), ("retain", sets["retain"]))}
        return localize_records(model, read, tokenizer, LocalizeConfig(**settings))

    forget = sets["forget"]
    selection = localize(forget)
    if method.halves:
        selection = (localize(forget[0::2]) & localize(forget[1::2])).limit(share)
    elif method.categories:
        selection = selection.limit(share)
    categories = {
        site: values if begin <= site.layer < end else torch.zeros_like(values)
        for site, values in selection.categories.items()
    }
    return Selection(selection.sites, categories, selection.scores, selection.source, selection.fingerprint)


def zero(model: nn.Module, selection: Selection) -> int:
    """Sets what the selected units write to zero, and returns how many weights that are."""
    zeroed = 0
    with torch.no_grad():
        for site in selection.sites:
            units = selection.units(site)
            for owned in site.slices:
                if owned.parameter.startswith(site.output):
                    weight = owned.of(model.get_parameter(owned.parameter))
                    weight.index_fill_(owned.dim, owned.index(units), 0.0)
                    zeroed += len(units) * owned.size * weight.shape[1 - owned.dim]
    return zeroed


@contextmanager
def noisy_inputs(model: Any, scale: float, seed: int) -> Iterator[None]:
    """While training, adds normal noise to what every MLP reads, ``scale`` times its standard deviation."""
    if not scale:
        yield
        return
    draw = torch.Generator().manual_seed(seed)

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not torch.is_grad_enabled():
            return None
        (x,) = inputs
        noise = torch.randn(x.shape, generator=draw).to(x.dtype)
        return (x + scale * x.detach().std() * noise,)

    hooks = [layer.mlp.register_forward_pre_hook(add) for layer in model.get_decoder().layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Dense:
    """The training of all weights or of adapters, as an objective sees it."""

    def __init__(self, model: Any, adapters: bool) -> None:
        self.model, self.adapters = model, adapters
        self.weights = {} if adapters else {name: value.detach().clone() for name, value in model.named_parameters()}

    @contextmanager
    def original(self) -> Iterator[Any]:
        """The model as it was before training."""
        if self.adapters:
            with self.model.disable_adapter():
                yield self.model
            return
        trained = {name: value.data for name, value in self.model.named_parameters()}
        self._put(self.weights)
        try:
            yield self.model
        finally:
            self._put(trained)

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        """Nothing depends on it."""

    def _put(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.data = values[name]


def train_dense(model: Any, tokenizer: Any, sets: dict[str, list[Record]], run: Run, grid: Grid) -> int:
    """Trains all weights, or adapters that are merged at the end; with the batches and the schedule of the others.

    AdamW without weight decay on float32 copies, since in bfloat16 small updates are lost.
    """
    method, trained = run.method, model
    if method.train == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(run.random_seed)
        trained = get_peft_model(
            model, LoraConfig(r=method.rank, lora_alpha=2 * method.rank, target_modules="all-linear")
        )
    training = Dense(trained, method.train == "lora")
    weights = [value for value in trained.parameters() if value.requires_grad]
    masters = [value.detach().float().requires_grad_() for value in weights]
    optimizer = torch.optim.AdamW(masters, lr=run.rate * unit_of_rates(model), weight_decay=0.0)
    warmup = max(1, round(WARMUP * grid.steps)) if WARMUP < 1 else int(WARMUP)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (grid.steps - step) / max(1, grid.steps - warmup))
    )
    objective = objective_of(method)
    pairs = encode_pairs(
        model,
        tokenizer,
        sets["forget"],
        sets["retain"],
        None,
        teaches=teaches_answers(objective, None),
        max_length=None,
        collated=False,
        seed=run.random_seed,
    )
    sampler = PairSampler(len(pairs.forget), len(pairs.retain), run.random_seed, grid.retain_ratio)
    collate = PairCollator(Collator(padding_token(tokenizer, model)))
    for batch in islice(_batches(sampler, grid.batch), grid.steps):
        loss, _ = objective.loss(trained, collate([pairs[pair] for pair in batch]), training)
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
    if method.train == "lora":
        trained.merge_and_unload()
    return sum(value.numel() for value in weights)


def _batches(sampler: PairSampler, size: int) -> Iterator[list[Pair]]:
    """Epoch after epoch in batches of that many pairs."""
    for sampler.epoch in count():
        pairs = list(sampler)
        yield from (pairs[start : start + size] for start in range(0, len(pairs), size))
