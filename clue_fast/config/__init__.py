"""Settings: every default once, with its help, its choices and its check.

``localize`` takes what stands in ``LocalizeConfig``, ``evaluate_model`` what stands in ``EvalConfig``, and ``unlearn``
all of it and what stands in ``UnlearnConfig``, as keyword arguments; the command makes its flags of the same fields,
and a configuration file has their names. A value out of range is refused with the name of its field.

Nothing here imports what it is a setting of: the choices of a field are looked up where they are registered when
somebody asks, so that a criterion or an objective of one's own is among them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from clue_fast.config.schema import (
    ByKind,
    check_choices,
    check_rule,
    every_one_of,
    integer,
    is_number,
    name_list,
    not_negative,
    part_of_depth,
    positive,
    positive_integer,
    ratio,
    read_settings,
    registered,
    setting,
    share,
    share_or_none,
    switch,
    two_shares,
    whole_number,
)
from clue_fast.errors import BudgetError, SettingError
from clue_fast.selection import DEFAULT_FRACTION, NORMALIZATIONS, SCOPES, check_budget, check_normalization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

Config = TypeVar("Config", bound="RunConfig")

OBJECTIVE = "undial"
OBJECTIVE_SETTINGS: Mapping[str, float] = {"strength": 20.0, "retain_weight": 10.0}
"""The default objective has a fixed target, what the model would say if it did not know the answer, so that nothing
runs away. With the rate and the steps below it was chosen on data that no reported table is made of, see
``bench/defaults.py``."""

CRITERION = "attribution"
"""The default criterion did best at small budgets on facts that real models know, see docs/evidence.md."""

LAYER_LR = 0.2
RETAIN_RATIO = 4
LOWER_LAYERS_GB = 1.0
BATCH_SIZE = 8
WIDTH_RATE = 0.4
EPOCHS = 10.0
STEPS = 200
WARMUP = 0.1
PERMUTATIONS = 30
MAX_LENGTH = 512
TOKENS_PER_BATCH = 4096
TIME_LIMIT = 60.0


def default_learning_rate(model: PreTrainedModel, share: float = DEFAULT_FRACTION) -> float:
    """Returns 0.4 / (width · sqrt(share)).

    That it falls with the width is the rule for Adam of Yang et al. 2022 (arXiv 2203.03466). The fewer units train, the
    further each has to go; the root is what fits the best rates on SmolLM2-135M and on models of a width of 128 to 192,
    see docs/evidence.md. For a model of another kind it is a place to start from.

    Args:
        model: whose embeddings have that width.
        share: of the units of the model that train, in (0, 1].
    """
    width: int = model.get_input_embeddings().weight.shape[-1]  # type: ignore[index, assignment]
    return WIDTH_RATE / (width * math.sqrt(share))


def default_epochs(records: int, batch_size: int) -> float:
    """Returns 10, or as many epochs as 200 steps take: a small forget set needs more passes."""
    return max(EPOCHS, float(math.ceil(STEPS / math.ceil(records / max(1, batch_size)))))


@dataclass(frozen=True)
class CircuitConfig:
    """How circuits are found, for the criterion ``circuit``.

    Attributes:
        edges: of each circuit in each direction: a number, or a share of the edges of the model.
        steps: runs a direction that the gradient is averaged over; 0 for the gradient at the run itself.
        corruption: how corrupted prompts are made, see ``clue_fast.criteria.circuit.corrupt``.
        logic: how gates are read: "published" as in the paper, or "cut", by which a node may go off although its inputs
            stay on; see ``make_formula``.
        time_limit: of the solver, in seconds.
        granularity: "neuron" gives the category of an MLP to the units inside it that matter most; "node" to all.
        tokens_per_batch: most tokens in one forward pass, padding included.
    """

    edges: float = setting(0.05, "edges of each circuit, a number or a share", read=float, metavar="N")
    steps: int = setting(0, "runs that gradients are averaged over", read=int, metavar="N")
    corruption: str = setting(
        "auto",
        "what is replaced in corrupted prompts",
        choices=registered("criteria.circuit.corruption.CORRUPTIONS"),
        metavar="HOW",
    )
    logic: str = setting(
        "published",
        "how gates are read; cut decides more",
        choices=registered("criteria.circuit.logic.LOGICS"),
        metavar="LOGIC",
    )
    time_limit: float = setting(TIME_LIMIT, "of the solver, in seconds", read=float, metavar="S")
    granularity: str = setting(
        "neuron", "node: all units of an MLP are one", choices=("neuron", "node"), metavar="UNITS"
    )
    tokens_per_batch: int = setting(512, "in one forward pass for circuits", read=int, metavar="N")

    def __post_init__(self) -> None:
        edges = self.edges
        if not (is_number(edges) and (0.0 < edges <= 1.0 or (1.0 < edges < math.inf and edges == int(edges)))):
            raise BudgetError(f"edges {edges} is neither a share in (0, 1] nor a whole number above 1")
        for name, least in (("steps", 0), ("tokens_per_batch", 1)):
            value = getattr(self, name)
            if not (is_number(value) and least <= value < math.inf and value == int(value)):
                raise BudgetError(f"{name} {value} is not a whole number from {least} on")
        if not (is_number(self.time_limit) and self.time_limit > 0.0):
            raise BudgetError(f"time_limit {self.time_limit} is not a number of seconds above 0")
        check_choices(self)

    def edge_count(self, available: int) -> int:
        """The number of edges of each circuit in each direction. Raises BudgetError if there are not as many."""
        count = round(self.edges * available) if self.edges <= 1 else int(self.edges)
        if count > available:
            raise BudgetError(f"edges {count} is more than the {available} edges of the model")
        return max(1, count)


@dataclass(frozen=True)
class RunConfig:
    """What all runs share.

    Attributes:
        seed: random seed.
        max_length: longer records are cut, in tokens.
        progress: show progress bars.
    """

    seed: int = setting(0, "random seed", read=int, check=integer)
    max_length: int = setting(MAX_LENGTH, "longer records are cut, in tokens", read=int, check=positive_integer)
    progress: bool = setting(True, "", check=switch)

    def __post_init__(self) -> None:
        for one in fields(self):
            value, check = getattr(self, one.name), one.metadata["check"]
            if value is not None and check is not None:
                check(one.name, value)

    @classmethod
    def of(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The configuration with those of the values that it has fields for.

        Raises:
            ClueFastError: one is out of range, or two exclude each other.
        """
        return cls(**{one.name: values[one.name] for one in fields(cls) if one.name in values})

    @classmethod
    def load(cls: type[Config], path: str | os.PathLike[str]) -> Config:
        """Reads a configuration file, YAML or JSON.

        Raises:
            ClueFastError: see ``clue_fast.config.schema.read_settings``.
        """
        made: Config = read_settings(path, cls).make(cls)
        return made


@dataclass(frozen=True)
class LocalizeConfig(RunConfig):
    """How ``localize`` finds the units where forget and retain data conflict.

    Attributes:
        criterion: a key of ``clue_fast.criteria.CRITERIA``; ``circuit`` is the logic of circuits.
        fraction, count, threshold, scope, normalize: the budget, see ``clue_fast.select``; default the top 1 % of
            every layer.
        categories: give every unit one of the four categories, from its importance to each set, instead of ranking
            units by one score; see ``clue_fast.categorize``. The criterion ``circuit`` always does.
        circuit: of the criterion ``circuit``.
        target: what is differentiated, a key of ``clue_fast.criteria.TARGETS``; default is the criterion's own.
        kinds: of units, see ``clue_fast.find_sites``; default the channels of MLPs and experts, with ``circuit`` also
            the projections of heads.
        layers: begin and end of the part of the layers to take units of, as shares of the depth: (0.667, 1.0) for the
            last third; the budget is then a share of its units. Default all layers. Not for ``circuit``, whose nodes
            are in all of them.
        strict: raise where something looks like a site but is none that is known, or where a gated MLP cannot be
            fused, see ``clue_fast.patch``. Otherwise the log warns of the first, which is left out, and the second is
            recorded through a hook.
        permutations: how often the labels forget and retain of records are exchanged, to say in
            ``Selection.reliability`` whether other labels do as well and whether two halves of the data agree; no
            further pass over the data. 0 says nothing.
        tokens_per_batch: most tokens in one forward pass, padding included.
        backend: forces a backend.
    """

    criterion: str = setting(CRITERION, "formula of the score", choices=registered("criteria.CRITERIA"), metavar="NAME")
    fraction: float | Mapping[str, float] | None = setting(
        None, "share of the units to select, or by kind: mlp=0.1,attention=0.2 (0.01)", read=ByKind(float), metavar="F"
    )
    count: int | Mapping[str, int] | None = setting(
        None, "number of units to select in place of a share, also by kind", read=ByKind(int), metavar="N"
    )
    threshold: float | None = setting(None, "select the units with this score or more", read=float, metavar="SCORE")
    scope: str = setting("layer", "what is ranked together", choices=SCOPES, metavar="SCOPE")
    normalize: str | None = setting(
        None, "make scores comparable between layers", choices=lambda: tuple(NORMALIZATIONS), metavar="HOW"
    )
    categories: bool = setting(False, "tell forget, retain and conflict units apart", check=switch)
    target: str | None = setting(
        None, "what is differentiated (the criterion's own)", choices=registered("criteria.TARGETS"), metavar="TARGET"
    )
    kinds: Iterable[str] | None = setting(
        None,
        "units to look at (mlp,expert)",
        read=name_list,
        choices=registered("sites.KINDS"),
        metavar="K",
    )
    layers: tuple[float, float] | None = setting(
        None,
        "part of the layers to take units of, as shares of the depth, such as 0.667:1 (all)",
        read=two_shares,
        check=part_of_depth,
        metavar="FROM:TO",
    )
    strict: bool = setting(False, "stop at a layer that is not known or cannot be fused", check=switch)
    permutations: int = setting(
        PERMUTATIONS, "exchanges of labels that the selection is compared with, 0 for none", read=int, metavar="N"
    )
    circuit: CircuitConfig | None = setting(None, "", part=CircuitConfig)
    tokens_per_batch: int = setting(
        TOKENS_PER_BATCH, "in one forward pass while localizing", read=int, check=positive_integer, metavar="N"
    )
    backend: str | None = setting(
        None, "force a backend (the best there is)", choices=registered("ops.backend.BACKENDS"), metavar="NAME"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.fraction, count=self.count, threshold=self.threshold, scope=self.scope)
        check_normalization(self.normalize)

    @property
    def budget(self) -> dict[str, Any]:
        """The budget as ``select`` takes it."""
        return {name: getattr(self, name) for name in ("fraction", "count", "threshold", "scope", "normalize")}


@dataclass(frozen=True)
class EvalConfig(RunConfig):
    """How deeply something is forgotten, asked of the forget set alone; see ``clue_fast.evaluate``.

    Attributes:
        samples: answers to sample to each forget question.
        relearn: forget records that a copy of the model learns again before it is asked the others.
        attacks: names of ``clue_fast.evaluation.ATTACKS``, or "all"; None for none.
        metrics: names of further metrics of ``clue_fast.evaluation.METRICS``, or "all", of every set; None for none.
    """

    samples: int = setting(0, "also sample K answers to each forget question", read=int, check=integer, metavar="K")
    relearn: int = setting(
        0, "also let a copy of the model learn N forget records again", read=int, check=integer, metavar="N"
    )
    attacks: Iterable[str] | None = setting(
        None,
        "also attack the model for the forget records, NAMES with commas between (none)",
        read=name_list,
        choices=lambda: ("all", *registered("evaluation.ATTACKS")()),
        check=every_one_of("attack", lambda: ("all", *registered("evaluation.ATTACKS")())),
        metavar="NAMES",
    )
    metrics: Iterable[str] | None = setting(
        None,
        "also measure further metrics, NAMES with commas between (none)",
        read=name_list,
        choices=lambda: ("all", *registered("evaluation.METRICS")()),
        check=every_one_of("metric", lambda: ("all", *registered("evaluation.METRICS")())),
        metavar="NAMES",
    )

    @property
    def measures(self) -> dict[str, Any]:
        """What ``clue_fast.evaluate`` takes; how deeply something is forgotten is asked of the forget set alone."""
        depth = {"samples": {"forget": self.samples}, "relearn": {"forget": self.relearn}}
        named = {"attacks": {"forget": self.attacks or ()}, "metrics": self.metrics or ()}
        return {**depth, **named, "seed": self.seed, "max_length": self.max_length, "progress": self.progress}


@dataclass(frozen=True)
class UnlearnConfig(LocalizeConfig, EvalConfig):
    """How ``unlearn`` localizes, trains and evaluates.

    It is no ``transformers.TrainingArguments`` and makes one (``training_arguments``): to import those takes seconds
    that ``clue-fast --help`` has not, and most of their hundred fields, such as those of mixed precision, checkpoints
    and distribution, have no meaning for a run that localizes and evaluates too. Whoever wants them takes
    ``UnlearnTrainer``.

    Attributes:
        objective: see ``clue_fast.objectives.OBJECTIVES``, or an ``Objective``; default UNDIAL with a strength of 20
            and a retain weight of 10 (that of the schedule, if stages name one).
        stages: "clue" for the published schedule and the settings that belong to it, unless they are given here (see
            ``clue_fast.trainer.stages.CLUE``), or a sequence of ``Stage``. The selection then needs categories; a
            stage of which it has no units is skipped.
        learning_rate: of the first layer; default see ``default_learning_rate``.
        layer_lr: rate of the last layer over that of the first, geometric in between, "linear:RATIO" in equal steps,
            or another rate by layer, see ``clue_fast.sparse.LayerRate``. Default 0.2, or that of the published
            schedule.
        master_weights: keep small updates in float32 copies of the selected weights, see ``SparseAdamW``.
        stochastic_rounding: keep no copies, and round at random.
        epochs: passes over the forget set; default see ``default_epochs``; stages have their own.
        rounds: how often units are selected and trained, each time on the model that the round before has left, which
            is then also the original that an objective compares with. The epochs are dealt out among the rounds.
        batch_size: forget records per step.
        retain_ratio: retain records beside each forget record. Default 4, or that of the published schedule.
        lower_layers_gb: memory, in GB, for what the layers below the lowest selected one put out: they run once for
            each record, and are skipped in later epochs; 0: all layers run in every step.
        packed_tokens: tokens of a row into which the records of a step are packed without padding, see
            ``UnlearnTrainer``; None: they are padded, in passes of similar length.
        forget_target: share of the forget questions that shall no longer be answered (ROUGE-L recall below 0.5). Once
            trained, the update is then scaled down to the smallest share of itself that reaches the target on a random
            half of the forget questions and on their rewordings (``paraphrased_question``), see
            ``clue_fast.trainer.scale_update``. The other half was not looked at and is reported as a set of its own,
            "forget_reported", with a column before and one after. It makes up for what was damaged, and for that
            forgets less deeply. None, the default, keeps the whole update.
        evaluate_every: steps between evaluations of forget and retain recall during training, 0 for none.
    """

    objective: Any = setting(
        None,
        "loss to minimize (undial, strength 20, retain weight 10)",
        choices=registered("objectives.OBJECTIVES"),
        metavar="NAME",
    )
    stages: Any = setting(
        None,
        "a published schedule: forget units for one epoch, then conflict units for five, and what goes with it",
        choices=registered("trainer.stages.SCHEDULES"),
        metavar="NAME",
    )
    learning_rate: float | None = setting(
        None,
        f"of the first layer ({WIDTH_RATE} / width / sqrt of the share of units)",
        read=float,
        check=positive,
        metavar="LR",
    )
    layer_lr: Any = setting(
        None,
        f"rate of the last layer over the first ({LAYER_LR}), geometric between; linear:RATIO in equal steps",
        read=ratio,
        metavar="RATIO",
    )
    master_weights: bool = setting(True, "keep small updates in float32 copies of the selected weights", check=switch)
    stochastic_rounding: bool = setting(
        False, "round small updates at random instead; with --no-master-weights", check=switch
    )
    epochs: float | None = setting(
        None, f"passes over the forget set ({EPOCHS:.0f}, or {STEPS} steps)", read=float, check=positive, metavar="N"
    )
    rounds: int = setting(
        1,
        "localize and train in turns so many times, with as many epochs in all",
        read=int,
        check=positive_integer,
        metavar="N",
    )
    batch_size: int = setting(BATCH_SIZE, "forget records a step", read=int, check=positive_integer, metavar="N")
    retain_ratio: int | None = setting(
        None,
        f"retain records to each forget record ({RETAIN_RATIO})",
        read=int,
        check=positive_integer,
        metavar="N",
    )
    lower_layers_gb: float = setting(
        LOWER_LAYERS_GB,
        "memory in GB to skip the layers below the lowest selected one from the second epoch on; 0: run them",
        read=float,
        check=not_negative,
        metavar="GB",
    )
    packed_tokens: int | None = setting(
        None,
        "pack the records of a step into rows of so many tokens, without padding (passes of similar length)",
        read=int,
        check=positive_integer,
        metavar="N",
    )
    forget_target: float | None = setting(
        None,
        "scale the update down until just this share of one half of the forget questions is unanswered (none)",
        read=share_or_none,
        check=share,
        metavar="SHARE",
    )
    evaluate_every: int = setting(
        0,
        "steps between evaluations of the recall while training",
        read=int,
        check=whole_number,
        metavar="N",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer_lr, str):
            check_rule(self.layer_lr)
        elif isinstance(self.layer_lr, int | float):
            positive("layer_lr", self.layer_lr)
        if self.stages is not None and self.epochs is not None:
            raise SettingError("stages have epochs of their own; leave epochs out")
        for name in ("stages", "forget_target"):
            if self.rounds > 1 and getattr(self, name) is not None:
                raise SettingError(f"{name} is of one localization and training; leave out {name} or rounds")
        if self.master_weights and self.stochastic_rounding:
            raise SettingError(
                "master_weights and stochastic_rounding exclude each other; set master_weights to False to round "
                "stochastically"
            )

    def training_arguments(self, output_dir: str | os.PathLike[str]) -> TrainingArguments:
        """The arguments of the ``UnlearnTrainer`` of a run: nothing is saved on the way, nothing is reported.

        Learning rate and epochs must be known.
        """
        import torch
        from transformers import TrainingArguments

        assert self.learning_rate is not None and self.epochs is not None
        return TrainingArguments(
            output_dir=os.fspath(output_dir),
            learning_rate=self.learning_rate,
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            seed=self.seed,
            weight_decay=0.0,
            warmup_steps=WARMUP,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=not self.progress,
            dataloader_pin_memory=torch.cuda.is_available(),
        )


@dataclass(frozen=True)
class ModelConfig:
    """How a model is loaded by its name, see ``clue_fast.trainer.checkpoints.load_model``.

    Attributes:
        device: such as "cuda:1"; default the GPU if there is one.
        dtype: of the weights; "auto" is that of the checkpoint.
        trust_remote_code: run code that comes with the model.
    """

    device: str | None = setting(None, "where the model runs, such as cuda:1 (the GPU if there is one)")
    dtype: str = setting(
        "auto", "of the weights; auto: the checkpoint's", choices=("auto", "float32", "bfloat16", "float16")
    )
    trust_remote_code: bool = setting(False, "run code that comes with the model", check=switch)

    def __post_init__(self) -> None:
        check_choices(self, "dtype")
