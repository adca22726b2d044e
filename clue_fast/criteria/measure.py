"""Measures what a criterion needs, in passes over forget and retain data: from records to statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from clue_fast.config import TOKENS_PER_BATCH, LocalizeConfig
from clue_fast.criteria.blocks import BlockStatistics, deal
from clue_fast.criteria.measurements import Job, Recorded, run_patched
from clue_fast.criteria.passes import Batches, check_target
from clue_fast.criteria.registry import Criterion, get_criterion
from clue_fast.data import Example, Record, encode_for, load_retain_sets, padding_token
from clue_fast.recording import Patched
from clue_fast.sites import DEFAULT_KINDS, Survey, survey
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_TARGET = "log_odds"


@dataclass(frozen=True)
class Task:
    """A model, the records of both sets, and how a criterion is to measure one by the other.

    Attributes:
        model: with the sites that were found in it.
        tokenizer: of the model.
        found: the sites.
        forget: records of the forget set.
        retain: records of each retain set, by name; "retain" where there is one.
        criterion: that needs to be measured.
        target: what is differentiated, a key of ``TARGETS``, or None for the criterion's own.
        settings: of the criterion, or None.
        max_length, tokens_per_batch, backend, progress: see ``measure``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    found: Survey
    forget: Sequence[Record]
    retain: Mapping[str, Sequence[Record]]
    criterion: Criterion
    target: str | None = None
    settings: Any = None
    max_length: int = 512
    tokens_per_batch: int = TOKENS_PER_BATCH
    backend: str | None = None
    progress: bool = True

    @property
    def groups(self) -> dict[str, Sequence[Record]]:
        """The records of forget and of all retain sets together."""
        every = list(self.retain.values())
        retain = every[0] if len(every) == 1 else [record for records in every for record in records]
        return dict(zip(DEFAULT_GROUPS, (self.forget, retain), strict=True))

    @property
    def differentiated(self) -> str:
        """What is differentiated. Raises UnknownNameError if there is no such target."""
        return check_target(self.target or self.criterion.target or DEFAULT_TARGET)

    def check(self) -> None:
        """Raises SiteError if a site cannot be measured, before the model runs over any data."""
        self.criterion.measurement.check(self.model, Statistics(self.found.sites, self.found.model))

    def encoded(self) -> dict[str, list[Example]]:
        """The records by group, as the model reads them."""
        return {
            name: encode_for(self.model, records, self.tokenizer, self.max_length, name)
            for name, records in self.groups.items()
        }

    def record(self, data: Sequence[Sequence[Example]], groups: Sequence[str] = DEFAULT_GROUPS) -> Recorded:
        """Measures what the criterion needs of encoded records, by group."""
        pad = padding_token(self.tokenizer, self.model) if data else 0
        batches = Batches(data, pad, self.tokens_per_batch, self.progress, groups)
        criterion = self.criterion
        job = Job(self.model, self.found, batches, self.differentiated, self.backend, criterion.reads)
        return _record(criterion, job)


def load_task(model: PreTrainedModel, forget: Any, retain: Any, **settings: Any) -> Task:
    """Returns the task over data sets as they were given, whose records are loaded and compared.

    Raises:
        DataError: a set is empty or unreadable, or forget and retain records are the same.
    """
    sets = load_retain_sets(forget, retain if isinstance(retain, Mapping) else {"retain": retain})
    return Task(model=model, forget=sets.pop("forget"), retain=sets, **settings)


def measure(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = LocalizeConfig.criterion,
    target: str | None = None,
    kinds: Iterable[str] = DEFAULT_KINDS,
    max_length: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    backend: str | None = None,
    progress: bool = True,
) -> Statistics:
    """Records the statistics that a criterion needs, where answers of both sets are predicted, in one pass over both.

    Args:
        model, forget, retain, tokenizer: see ``localize``.
        criterion: a key of ``CRITERIA``; what it needs, and what that costs, is in ``MEASUREMENTS``.
        target: what is differentiated, a key of ``TARGETS``; default is the criterion's own.
        kinds: of units, see ``find_sites``.
        max_length: longer records are cut, in tokens.
        tokens_per_batch: most tokens in one forward pass, padding included.
        backend: forces a backend.
        progress: show a progress bar.
    """
    task = load_task(
        model,
        forget,
        retain,
        tokenizer=tokenizer,
        found=_found(model, kinds),
        criterion=get_criterion(criterion),
        target=target,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        backend=backend,
        progress=progress,
    )
    return measure_task(task)


def measure_task(task: Task) -> Statistics:
    """Records the statistics of a task; without passes over the data, these are not encoded."""
    reads = task.criterion.measurement.passes != (0, 0)
    return task.record(list(task.encoded().values()) if reads else []).statistics


def measure_blocks(task: Task, seed: int = 0) -> BlockStatistics:
    """Records the same as ``measure_task`` in the same pass, with a sum for each block of records.

    Args:
        task: by a criterion whose measurement can be made by blocks.
        seed: which records come together, see ``deal``.
    """
    groups = task.groups
    blocks = deal(groups["forget"], groups["retain"], seed)
    encoded = task.encoded()
    data = [[encoded[block.group][place] for place in block.records] for block in blocks]
    # The first two are of forget and of retain records, and have the names that statistics begin with.
    names = [*DEFAULT_GROUPS, *(f"{block.group} {number}" for number, block in enumerate(blocks[2:], start=2))]
    recorded = task.record(data, names)
    return BlockStatistics(recorded.statistics, blocks, recorded.regrouped)


def measure_batches(
    model: nn.Module,
    batches: Batches,
    criterion: str,
    *,
    target: str | None = None,
    kinds: Iterable[str] = DEFAULT_KINDS,
    backend: str | None = None,
) -> Statistics:
    """Records the statistics that a criterion needs, of records that are encoded already.

    Args:
        model: with sites, see ``find_sites``.
        batches: of group 1, forget, and group 2, retain.
        criterion, target, kinds, backend: see ``measure``.
    """
    chosen = get_criterion(criterion)
    differentiated = check_target(target or chosen.target or DEFAULT_TARGET)
    return _record(chosen, Job(model, _found(model, kinds), batches, differentiated, backend, chosen.reads)).statistics


def record_groups(
    patched: Patched,
    data: Sequence[Sequence[Example]],
    *,
    pad_token_id: int,
    gradients: bool = False,
    target: str = DEFAULT_TARGET,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> Statistics:
    """Records encoded records by group, only where a token of the answer is predicted.

    Records of all groups are sorted by length and share batches. Without gradients only the layers run, not the
    language-model head.

    Args:
        patched: a patched causal language model.
        data: encoded records of group 1 (forget), group 2 (retain) and so on, see ``clue_fast.data.encode``.
        pad_token_id: fills up shorter records of a batch.
        gradients: also record a·∂f/∂a, f the sum of the target of the answer tokens.
        target: a key of ``TARGETS``.
        tokens_per_batch: most tokens in one forward pass, padding included.
        progress: show a progress bar.
    """
    batches = Batches(data, pad_token_id, tokens_per_batch, progress)
    return run_patched(patched, batches, check_target(target) if gradients else None)


def _record(criterion: Criterion, job: Job) -> Recorded:
    recorded = criterion.measurement.record(job)
    recorded.statistics.check_finite()
    return recorded


def _found(model: nn.Module, kinds: Iterable[str]) -> Survey:
    """The sites of a model. Raises SiteError if there are none."""
    found = survey(model, kinds)
    found.check()
    return found
