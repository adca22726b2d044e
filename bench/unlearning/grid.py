"""A grid of runs, read from one YAML file.

.. code-block:: yaml

    model: smollm2-135m            # a key of clue_fast.demo.pretrained.PRETRAINED, or of bench.unlearning.toys.TOYS
    kind: capital                  # of the facts to forget, a key of clue_fast.demo.facts.FACTS, or of the toy's kinds
    seeds: [0, 1, 2, 3, 4]         # of the split and of everything that is random
    steps: 20                      # of training, with as many records in each as there are facts to forget
    budgets: [0.003, 0.01]         # shares of the units of every layer
    rates: [1, 2, 4]               # learning rates, in units of 1.2 / width of the model,
                                   # or such a list by budget: {0.003: [3, 9, 27], 0.01: [1, 3, 9]}
    methods:
      random: {criterion: random}
      difference: {criterion: difference}
      full: {train: all, budgets: [1.0], rates: [0.01, 0.02, 0.05]}

A setting of a method is one of ``Method``; whatever else stands in the file goes for all methods.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml

TRAINED = ("units", "all", "lora", "nothing", "retrained")
"""What trains: the selected units, all weights, adapters of low rank, or nothing (the selected units are zeroed); or a
new model, without what is to be forgotten (toys only)."""

RESET = (None, "reads", "writes")
POSITIONS = ("answer", "subject")


@dataclass(frozen=True)
class Method:
    """One way to unlearn.

    Attributes:
        train: see ``TRAINED``.
        criterion: that selects the units.
        scope: what is ranked together; "layer" takes the same share of every layer.
        kinds: of units; None for those of the criterion.
        target: what the criterion differentiates, or None for its own.
        positions: tokens at which units are measured: those that predict the answer, or the last one of the subject.
        categories: take forget and conflict units of the four categories, at most the budget.
        layers: first and one after the last layer to take units of, each as shares of the depth.
        halves: take what both halves of the forget records agree on.
        layer_lr: rate of the last layer over that of the first.
        objective, parameters: the loss; None for the package's default.
        stages: name of a published schedule of stages, see ``clue_fast.trainer.stages.SCHEDULES``, over the steps of
            the grid; its rate by layer and retain ratio are those of method and grid.
        rank: of the adapters.
        noise: standard deviation of noise on the inputs of the layers while training, over that of the inputs.
        rounds: how often units are selected anew and trained, with the steps of the grid for all rounds together. Each
            is a training of its own: the original model of its objective is what the round before has left.
        requests: the records to forget are dealt out into that many parts, which are unlearned one after another, see
            ``bench.unlearning.requests``; with the steps of the grid for all parts together.
        reset: before training, what the selected units read ("reads") or write ("writes") becomes the mean over the
            units of their layer.
        sharpness: radius in which the forget term is taken where it is worst, see ``SharpnessAware``.
        relearn_inside, relearn_inside_rate: steps of relearning behind which the forget term is taken, and their
            learning rate, see ``RelearnedInside``.
        draws: how often it runs on each split, with another random seed each time.
        budgets, rates: those of the grid unless the method has its own.
    """

    train: str = "units"
    criterion: str = "random"
    scope: str = "layer"
    kinds: tuple[str, ...] | None = None
    target: str | None = None
    positions: str = "answer"
    categories: bool = False
    layers: tuple[float, float] = (0.0, 1.0)
    halves: bool = False
    layer_lr: float = 0.2
    objective: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    stages: str | None = None
    rank: int = 8
    noise: float = 0.0
    rounds: int = 1
    requests: int = 1
    reset: str | None = None
    sharpness: float = 0.0
    relearn_inside: int = 0
    relearn_inside_rate: float = 0.05
    draws: int = 1
    budgets: tuple[float, ...] | None = None
    rates: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.train not in TRAINED:
            raise ValueError(f"train: {self.train!r} is none of: {', '.join(TRAINED)}")
        if self.reset not in RESET:
            raise ValueError(f"reset: {self.reset!r} is none of: reads, writes")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: {self.positions!r} is none of: {', '.join(POSITIONS)}")
        if self.sharpness and self.relearn_inside:
            raise ValueError("sharpness and relearn_inside take the gradient of forgetting in two places; choose one")
        if self.requests != 1 and self.train in ("nothing", "retrained"):
            raise ValueError(f"requests is a setting of training; this method trains {self.train}")
        only = {"stages": self.stages, "rounds": self.rounds != 1, "reset": self.reset, "sharpness": self.sharpness}
        for name, given in {**only, "relearn_inside": self.relearn_inside}.items():
            if given and self.train != "units":
                raise ValueError(f"{name} is a setting of the training of units; this method trains {self.train}")


@dataclass(frozen=True)
class Grid:
    """Everything that a file says.

    Attributes:
        name: of the file.
        model, kind, seeds, steps, budgets, rates, methods: see the module.
        batch_size: forget records in a step; None for as many as there are facts to forget.
        dtype: of the weights of a pretrained model; small updates are kept in float32 copies.
        forget, retain, tune, held_out: facts of the kind that are forgotten, kept in training, held out to choose the
            rate, and held out for the report. Of toys, records.
        other_retain, other_tune, other_report: facts of other kinds, likewise.
        retain_ratio: retain records beside each forget record.
        baselines: the methods that others are compared with.
        relearn_steps: after a run, steps of relearning on half of the forgotten facts; the others are asked on the way.
        relearn_rate: their learning rate; None for that of ``clue_fast.evaluation.relearn``, which breaks real models,
            see ``RELEARNING_RATE`` in ``clue_fast.demo.real``.
    """

    name: str
    model: str
    kind: str
    methods: Mapping[str, Method]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 20
    budgets: tuple[float, ...] = (0.01,)
    rates: tuple[float, ...] | Mapping[float, tuple[float, ...]] = (1.0,)
    batch_size: int | None = None
    dtype: str = "bfloat16"
    forget: int = 6
    retain: int = 6
    tune: int = 6
    held_out: int = 12
    other_retain: int = 6
    other_tune: int = 6
    other_report: int = 12
    retain_ratio: int = 1
    baselines: tuple[str, ...] = ("random",)
    relearn_steps: int = 0
    relearn_rate: float | None = None

    @property
    def batch(self) -> int:
        """Forget records in a step."""
        return self.forget if self.batch_size is None else self.batch_size

    @classmethod
    def load(cls, path: Path) -> Grid:
        """Reads a file. Raises ValueError for a key that is unknown, or a baseline that is no method."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {one.name for one in fields(cls)}
        for key in content:
            if key not in known:
                raise ValueError(f"{path}: {key} is no setting of a grid; there are: {', '.join(sorted(known))}")
        methods = {name: _method(path, name, settings) for name, settings in content.pop("methods").items()}
        lists = {name: tuple(content[name]) for name in ("seeds", "budgets", "baselines") if name in content}
        if isinstance(content.get("rates"), list):
            lists["rates"] = tuple(content["rates"])
        grid = cls(**{"name": path.stem, **content, **lists, "methods": methods})
        if isinstance(grid.relearn_rate, str):  # YAML takes 1e-5 for a text
            raise ValueError(f"{path}: relearn_rate {grid.relearn_rate!r} is no number; write it with a point: 1.0e-5")
        if isinstance(grid.rates, Mapping):
            for budget in grid.budgets:
                if budget not in grid.rates:
                    raise ValueError(f"{path}: rates has none for the budget {budget:g}")
        for name in grid.baselines:
            if name not in methods:
                raise ValueError(f"{path}: the baseline {name!r} is no method")
        return grid

    def runs(self) -> Iterator[Run]:
        """All runs, seed by seed, so that what is there after an interruption can be compared."""
        for seed in self.seeds:
            for name, method in self.methods.items():
                for budget in method.budgets or self.budgets:
                    shared = self.rates[budget] if isinstance(self.rates, Mapping) else self.rates
                    rates = (0.0,) if method.train in ("nothing", "retrained") else method.rates or shared
                    for rate, draw in product(rates, range(method.draws)):
                        yield Run(name, method, budget, rate, seed, draw)

    def about(self) -> dict[str, Any]:
        """What all runs share, apart from which ones there are; a setting at its default does not stand in it."""
        apart = {"name", "methods", "seeds", "budgets", "rates", "baselines"}
        always = {"model": self.model, "kind": self.kind, "steps": self.steps}
        return {**always, **_changed(self, apart)}


@dataclass(frozen=True)
class Run:
    """One run of a grid."""

    name: str
    method: Method
    budget: float
    rate: float
    seed: int
    draw: int = 0

    @property
    def random_seed(self) -> int:
        """Of everything in this run that is random, apart from the split."""
        return self.seed + 1000 * self.draw

    def key(self, grid: Grid) -> dict[str, Any]:
        """What tells this run from all others, as JSON holds it; the facts of its split do not stand in it."""
        settings = {"criterion": self.method.criterion, **_changed(self.method, {"budgets", "rates", "draws"})}
        drawn = {"draw": self.draw} if self.draw else {}
        return {**grid.about(), **settings, "budget": self.budget, "rate": self.rate, "seed": self.seed, **drawn}


def _changed(settings: Grid | Method, apart: Collection[str]) -> dict[str, Any]:
    """The settings that differ from their defaults, as JSON holds them, so that a new setting leaves old keys valid."""
    found = {}
    for one in fields(settings):
        value = getattr(settings, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if one.name not in apart and value != default:
            found[one.name] = list(value) if isinstance(value, tuple) else value
    return found


def _method(path: Path, name: str, settings: Mapping[str, Any] | None) -> Method:
    known = {one.name for one in fields(Method)}
    for key in settings or {}:
        if key not in known:
            raise ValueError(f"{path}: {key} is no setting of the method {name}; there are: {', '.join(sorted(known))}")
    return Method(**{k: tuple(v) if isinstance(v, list) else v for k, v in (settings or {}).items()})
