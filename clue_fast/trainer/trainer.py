"""UnlearnTrainer: a ``transformers.Trainer`` that pairs what must be forgotten with what must be kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from clue_fast.config import LAYER_LR, LOWER_LAYERS_GB, RETAIN_RATIO
from clue_fast.config.schema import positive_integer
from clue_fast.data import Collator, Source, head_of, padding_token
from clue_fast.data.collator import longest
from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import ObjectiveError
from clue_fast.internals import TrainerEvents
from clue_fast.objectives import Objective, get_objective
from clue_fast.objectives.packing import INSTEAD, check_packing
from clue_fast.recording import Patched, patched_of
from clue_fast.selection import Selection
from clue_fast.sparse import LayerRate, Sparse, sparsify
from clue_fast.sparse.lower_layers import bytes_of
from clue_fast.trainer.checkpoints import detach_quantizer
from clue_fast.trainer.pairing import (
    Examples,
    PairCollator,
    PairSampler,
    encode_pairs,
    grouped,
)
from clue_fast.trainer.sparse_training import SparseTraining
from clue_fast.trainer.stages import Stage, get_schedule, get_stages, scheduled, scheduled_objective, stage_at


class UnlearnTrainer(TrainerEvents, Trainer):
    """Trains the selected units of a model on an objective. Everything else is the Trainer everybody knows.

    An epoch goes once through the forget records, in an order of its own; each is paired with ``retain_ratio``
    retain records, none of which comes again before all have been used. Both orders are functions of
    ``args.data_seed`` (or ``args.seed``) alone, so that a resumed run goes on as the first would have. The
    model stays sparse afterwards (``trainer.sparse.restore()`` undoes it); ``save_model`` writes a plain
    checkpoint at any time.

    To resume, build the trainer on the model as it was before unlearning: it is the reference of NPO.

    Args:
        model: a causal language model, or another with a head that the objective makes sense for; made sparse in
            place.
        args: as of any Trainer; a copy is kept. Learning rate, betas, eps and weight decay go to
            ``SparseAdamW``, or to ``SparseSGD`` with ``optim="sgd"`` (``optim_args="momentum=0.9"``). Default:
            nothing is saved on the way, nothing is reported.
        processing_class: the tokenizer; needed for records that are not encoded yet, saved with the model.
        forget_dataset, retain_dataset: records (see ``clue_fast.data.load_records``), or examples already
            encoded with ``input_ids`` and ``labels``.
        alternate_dataset: other answers to the questions of the forget records, one each and in the same
            order, for the objectives ``refusal`` and ``dpo``. Default: refusals such as "I don't know".
        retain_ratio: retain records beside each forget record; a batch of 8 with a ratio of 4 runs over 8 + 32.
            Default 4, with a published schedule that one's.
        selection: the units to train, made for this model.
        objective: its name, or an ``Objective``; default that of ``unlearn``, see ``default_objective``.
        layer_lr: learning rate of the last layer over that of the first, or another rate by layer, see
            ``LayerRate``. Default 0.2, with a published schedule that one's.
        master_weights, stochastic_rounding: see ``SparseAdamW``.
        stages: which units train on which objective in which epochs, instead of all on one: "clue" for the
            published schedule and the settings that belong to it, see ``clue_fast.trainer.stages.CLUE``, or a
            sequence of ``Stage``. Their epochs replace ``args.num_train_epochs``; the schedule of the learning rate
            spans them all. A stage of which the selection has no units is skipped.
        lower_layers_gb: memory, in GB, for what the layers below the lowest one that trains put out, see
            ``clue_fast.sparse.lower_layers``: they run once for each record, and are skipped in later epochs. Losses
            agree within rounding, also those of a resumed run; 0: all layers run in every step, and a resumed run goes
            on bit by bit.
        packed_tokens: the records of a step run in rows of up to so many tokens, one behind another without padding,
            forget and retain records in rows of their own; longer ones alone. Losses agree within rounding. None: they
            are padded, in passes of similar length.
        max_length: longest example in tokens, for records that are not encoded yet; None: as many as the model has
            positions for.
        kwargs: further arguments of ``transformers.Trainer``, such as ``eval_dataset`` and ``callbacks``. A
            ``data_collator`` makes a batch of a list of examples of one set; heads other than causal language
            models need one.

    Attributes:
        sparse: the ``Sparse`` of the model.
        objective: the ``Objective`` (of the stage under way).
        groups_tokens: whether batches say which tokens are to be forgotten and kept, for a patched model that records
            while it trains, see ``clue_fast.ConflictCallback``.
        sparse_training: what it does as every trainer of selected units does, see ``SparseTraining``, also for
            ``memory``, ``patched`` and ``reselect``.

    Raises:
        DataError: a data set is empty or unreadable, both share records, or there is no tokenizer to encode it.
        SelectionError, SparseError, NonFiniteError: see ``sparsify``, ``SparseTraining`` and ``get_stages``.
        SettingError: see ``check_precision`` in ``clue_fast.sparse.optimizer``; ``packed_tokens`` is not a positive
            integer.
        ObjectiveError: records cannot be packed for the model, see ``clue_fast.objectives.packing``, or an objective.
        UnknownNameError: no objective or schedule has that name.
    """

    @renamed_arguments(master=precision)
    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        forget_dataset: Source | Examples,
        retain_dataset: Source | Examples,
        alternate_dataset: Source | Examples | None = None,
        retain_ratio: int | None = None,
        selection: Selection,
        objective: str | Objective | None = None,
        layer_lr: LayerRate | None = None,
        master_weights: bool = True,
        stochastic_rounding: bool = False,
        stages: str | Sequence[Stage] | None = None,
        lower_layers_gb: float = LOWER_LAYERS_GB,
        packed_tokens: int | None = None,
        max_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        schedule = get_schedule(stages)
        layer_lr = scheduled("layer_lr", layer_lr, schedule, LAYER_LR)
        retain_ratio = scheduled("retain_ratio", retain_ratio, schedule, RETAIN_RATIO)
        self.objective: Objective = scheduled_objective(objective, schedule)
        self.stages = None if stages is None else get_stages(stages, self.objective, selection)
        args = _prepared(args)
        if self.stages is not None:
            args.num_train_epochs = sum(stage.epochs for stage in self.stages)
        seed = args.seed if args.data_seed is None else args.data_seed
        collate = kwargs.pop("data_collator", None)
        objectives = [self.objective] if self.stages is None else [get_objective(s.objective) for s in self.stages]
        if packed_tokens is not None:
            _check_packing(model, packed_tokens, objectives)
        records = encode_pairs(
            model,
            processing_class,
            forget_dataset,
            retain_dataset,
            alternate_dataset,
            teaches=any("alternate" in objective.forget_batches for objective in objectives),
            max_length=longest(model, max_length),
            collated=collate is not None,
            seed=seed,
        )
        self._sampler = PairSampler(len(records.forget), len(records.retain), seed, retain_ratio)
        self._logged: dict[str, list[Tensor]] = {}
        self._special_tokens = _special_tokens(model)
        self.groups_tokens = False
        detach_quantizer(model)
        # First, since a Trainer creates its output folder as soon as it is made.
        sparse = sparsify(model, selection)
        try:
            with _same_use_cache(model):
                super().__init__(
                    model=model,
                    args=args,
                    processing_class=processing_class,
                    train_dataset=records,
                    data_collator=PairCollator(collate or Collator(padding_token(processing_class, model))),
                    **kwargs,
                )
            self.sparse_training = SparseTraining(self, sparse, layer_lr, master_weights, stochastic_rounding)
        except BaseException:
            sparse.restore()
            raise
        sparse.packed_tokens = packed_tokens
        sparse.lower_layers.most_bytes = bytes_of(lower_layers_gb)
        # Gradients of 16 bits are scaled so that they do not vanish, and those of a pass would be taken without.
        sparse.backward_by_pass = getattr(self.accelerator, "scaler", None) is None
        sparse.lower_layers.forbidden = partial(_is_recorded, model)
        # The loss is a mean over records: micro-batches are averaged, not summed over their tokens.
        self.model_accepts_loss_kwargs = False
        self.add_callback(_Epochs(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss of the objective; for plain batches, as in evaluation, that of the model."""
        if "forget" not in inputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        batches = inputs
        if self.groups_tokens:
            batches = grouped(inputs, head_of(model, inputs["forget"]["labels"]))
        loss, logs = self.objective.loss(model, batches, self.sparse)
        for name, value in logs.items():
            self._logged.setdefault(name, []).append(value)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the objective, averaged since the last time, and the stage."""
        if "loss" in logs:
            logs |= {name: torch.stack(values).mean().item() for name, values in self._logged.items()}
            if self.stages is not None:
                logs["stage"] = self._stage + 1
            self._logged.clear()
        self.sparse_training.log(super().log, logs, start_time)

    @property
    def sparse(self) -> Sparse:
        """The ``Sparse`` of the model."""
        return self.sparse_training.sparse

    @property
    def memory(self) -> dict[str, int]:
        """See ``SparseTraining``."""
        return self.sparse_training.memory

    @property
    def patched(self) -> Patched | None:
        """See ``SparseTraining``."""
        return self.sparse_training.patched

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapping."""
        return self.sparse_training.optimizer

    def reselect(self, selection: Selection) -> None:
        """See ``SparseTraining.reselect``."""
        self.sparse_training.reselect(selection)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See ``transformers.Trainer.train``; the model is patched as long as it lasts."""
        return self.sparse_training.train(super().train, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See ``SparseTraining.create_optimizer``."""
        return self.sparse_training.create_optimizer()

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """See ``SparseTraining.create_scheduler``."""
        return self.sparse_training.create_scheduler(super().create_scheduler, num_training_steps, optimizer)

    def around_output_dir(self, inner: Callable[[Any], str], trial: Any) -> str:
        """See ``WholeCheckpoints``."""
        return self.sparse_training.checkpoints.output_dir(inner, trial)

    def around_save(self, inner: Callable[[Any, Any], None], model: Any, trial: Any) -> None:
        """See ``WholeCheckpoints``."""
        self.sparse_training.checkpoints.save(inner, model, trial)

    def train_sampler(self) -> PairSampler:
        """Pairs in the order of the epoch, see ``PairSampler``."""
        return self._sampler

    def _begin_epoch(self, epoch: int) -> None:
        self._sampler.epoch = epoch
        if self.stages is not None:
            self._stage = stage_at(self.stages, epoch)
            stage = self.stages[self._stage]
            self.objective = get_objective(stage.objective)
            self.sparse.train_only(*stage.units)


class _Epochs(TrainerCallback):
    """Tells the trainer the epoch, and keeps the special tokens that the model is configured with."""

    def __init__(self, trainer: UnlearnTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # A Trainer writes the tokenizer's into the configuration, a padding token without an embedding too, with which
        # no checkpoint loads.
        for config, name, token in self.trainer._special_tokens:
            setattr(config, name, token)

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        # A whole number at the start of an epoch; in a resumed one, somewhere within it.
        self.trainer._begin_epoch(int(state.epoch))


def _check_packing(model: nn.Module, packed_tokens: int, objectives: Sequence[Objective]) -> None:
    positive_integer("packed_tokens", packed_tokens)
    for objective in objectives:
        if type(objective).loss is not Objective.loss:
            raise ObjectiveError(f"{objective.name} runs the batches of a step itself, padded; {INSTEAD}")
    check_packing(model)


def _prepared(args: TrainingArguments | None) -> TrainingArguments:
    if args is None:
        args = TrainingArguments(output_dir="unlearned", save_strategy="no", report_to="none")
    args = copy.copy(args)
    args.remove_unused_columns = False  # no forward has arguments called forget and retain
    args.logging_nan_inf_filter = False  # it would log the average of other steps instead of a NaN
    return args


def _is_recorded(model: nn.Module) -> bool:
    patched = patched_of(model)
    return patched is not None and patched.is_recording


def _special_tokens(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """The special tokens that a model is configured with: where, name and value."""
    config: Any = getattr(model, "config", None)
    configs = (None if config is None else config.get_text_config(), getattr(model, "generation_config", None))
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    return [(one, name, getattr(one, name)) for one in configs for name in names if hasattr(one, name)]


@contextmanager
def _same_use_cache(model: nn.Module) -> Iterator[None]:
    """Keeps ``config.use_cache``, which a Trainer turns off and every checkpoint would then carry."""
    config: Any = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    yield
    if before is not None:
        config.use_cache = before
