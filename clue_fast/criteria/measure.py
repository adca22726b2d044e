"""Passes over forget and retain data that measure what a criterion needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from clue_fast.criteria.blocks import BlockStatistics, deal
from clue_fast.criteria.integrated_gradients import IntegratedGradients
from clue_fast.criteria.registry import answer_target, check_target, get_criterion, record_target
from clue_fast.criteria.weight_gradients import (
    SquaredGradientRecorder,
    WeightInputRecorder,
    mean_gradient_recorders,
    owned_parts,
)
from clue_fast.data import (
    Collator,
    Example,
    Record,
    answer_mask,
    check_disjoint,
    encode_for,
    head_of,
    load_records,
    padding_token,
)
from clue_fast.recording import Patched, patch
from clue_fast.sites import DEFAULT_KINDS, Site, find_sites, model_fingerprint
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_BATCH = 4096

MEASURED_BY_BLOCKS = ("activations", "gradients", "weight_inputs", "squared_gradients", "integrated_gradients")
"""What can be measured of many groups in one pass, and put together from them."""


def measure(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = "difference",
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
        criterion: a key of ``CRITERIA``; what it needs, and what that costs, is in ``criteria.PASSES``.
        target: what is differentiated, a key of ``targets.TARGETS``; default is the criterion's own.
        kinds: of units, see ``find_sites``.
        max_length: longer records are cut, in tokens.
        tokens_per_batch: most tokens in one forward pass, padding included.
        backend: forces a backend.
        progress: show a progress bar.
    """
    sets = _load(forget, retain)
    if get_criterion(criterion).needs == "nothing":
        return Statistics(find_sites(model, kinds), model_fingerprint(model))
    data = [encode_for(model, records, tokenizer, max_length, name) for name, records in sets.items()]
    batches = Batches(data, padding_token(tokenizer, model), tokens_per_batch, progress)
    return measure_batches(model, batches, criterion, target=target, kinds=kinds, backend=backend)


def measure_blocks(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = "difference",
    target: str | None = None,
    kinds: Iterable[str] = DEFAULT_KINDS,
    max_length: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    backend: str | None = None,
    progress: bool = True,
    seed: int = 0,
) -> BlockStatistics:
    """Records the same as ``measure`` in the same pass, with a sum for each block of records.

    Args:
        criterion: one whose needs are among ``MEASURED_BY_BLOCKS``.
        seed: which records come together, see ``deal``.
        model, forget, retain, tokenizer, target, kinds, max_length, tokens_per_batch, backend, progress: see
            ``measure``.
    """
    sets = _load(forget, retain)
    blocks = deal(sets["forget"], sets["retain"], seed)
    encoded = {group: encode_for(model, records, tokenizer, max_length, group) for group, records in sets.items()}
    data = [[encoded[block.group][place] for place in block.records] for block in blocks]
    # The first two are of forget and of retain records, and have the names that statistics begin with.
    names = [*DEFAULT_GROUPS, *(f"{block.group} {number}" for number, block in enumerate(blocks[2:], start=2))]
    batches = Batches(data, padding_token(tokenizer, model), tokens_per_batch, progress, names)
    statistics, inputs = _measure(model, batches, criterion, target, kinds, backend)
    return BlockStatistics(statistics, blocks, inputs)


def _load(forget: Any, retain: Any) -> dict[str, list[Record]]:
    """The records of both sets by the name of their group, forget first."""
    sets = {name: load_records(source, name) for name, source in zip(DEFAULT_GROUPS, (forget, retain), strict=True)}
    check_disjoint(sets)
    return sets


def measured_sites(
    model: nn.Module, criterion: str, *, kinds: Iterable[str] = DEFAULT_KINDS, backend: str | None = None
) -> tuple[Site, ...]:
    """Returns the sites that ``measure`` measures. Raises what it raises before it runs the model over any data."""
    needs = get_criterion(criterion).needs
    if needs in ("activations", "gradients"):
        with patch(model, kinds=kinds, strict=False, backend=backend) as patched:
            return patched.sites
    statistics = Statistics(find_sites(model, kinds), model_fingerprint(model))
    if needs == "integrated_gradients":
        IntegratedGradients(model, statistics)
    elif needs != "nothing":
        owned_parts(model, statistics)
    return tuple(statistics.sites)


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
    return _measure(model, batches, criterion, target, kinds, backend)[0]


def _measure(
    model: nn.Module,
    batches: Batches,
    criterion: str,
    target: str | None,
    kinds: Iterable[str],
    backend: str | None,
) -> tuple[Statistics, WeightInputRecorder | None]:
    """Statistics of the groups of the batches, and what recorded those of the inputs of weights, if that did."""
    chosen = get_criterion(criterion)
    differentiated = check_target(target or chosen.target or "log_odds")
    inputs = None
    if chosen.needs in ("activations", "gradients"):
        with patch(model, kinds=kinds, strict=False, backend=backend) as patched:
            for name in batches.groups:
                patched.statistics.group_index(name)
            target = differentiated if chosen.needs == "gradients" else None
            return _record_activations(patched, batches, target), None
    sites, device = find_sites(model, kinds), _device(model)
    statistics = Statistics(sites, model_fingerprint(model), batches.groups, device)
    if chosen.needs == "weight_inputs":
        inputs = _record_weight_inputs(model, statistics, batches)
    elif chosen.needs == "squared_gradients":
        _record_squared_gradients(model, statistics, batches, differentiated)
    elif chosen.needs == "mean_gradients":
        _record_mean_gradients(model, statistics, batches, differentiated)
    elif chosen.needs == "integrated_gradients":
        _record_integrated_gradients(model, statistics, batches, differentiated)
    statistics.check_finite()
    return statistics, inputs


def record_groups(
    patched: Patched,
    data: Sequence[Sequence[Example]],
    *,
    pad_token_id: int,
    gradients: bool = False,
    target: str = "log_odds",
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
        target: a key of ``targets.TARGETS``.
        tokens_per_batch: most tokens in one forward pass, padding included.
        progress: show a progress bar.
    """
    batches = Batches(data, pad_token_id, tokens_per_batch, progress)
    return _record_activations(patched, batches, check_target(target) if gradients else None)


@dataclass(frozen=True)
class Batches:
    """Encoded records of several groups, sorted by length, in padded batches.

    Attributes:
        data: encoded records of group 1, 2 and so on.
        pad_token_id: fills up shorter records.
        tokens_per_batch: most tokens in a batch, padding included.
        progress: show a progress bar.
        groups: their names.
    """

    data: Sequence[Sequence[Example]]
    pad_token_id: int
    tokens_per_batch: int
    progress: bool
    groups: Sequence[str] = DEFAULT_GROUPS

    def on(self, device: torch.device) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Yields batches, and the group of each of their records, int64."""
        items = sorted(
            ((record, group) for group, records in enumerate(self.data, start=1) for record in records),
            key=lambda item: len(item[0]["input_ids"]),
            reverse=True,
        )
        collate = Collator(self.pad_token_id)
        start = 0
        with tqdm(total=len(items), desc="localize", unit="record", disable=not self.progress) as bar:
            while start < len(items):
                size = max(1, self.tokens_per_batch // len(items[start][0]["input_ids"]))
                # Neighboring tokens of one group are summed together.
                chosen = sorted(items[start : start + size], key=lambda item: item[1])
                batch = collate([record for record, _ in chosen])
                groups = torch.tensor([group for _, group in chosen], device=device)
                yield {name: tensor.to(device) for name, tensor in batch.items()}, groups
                bar.update(len(chosen))
                start += size


def _record_activations(patched: Patched, batches: Batches, target: str | None) -> Statistics:
    """Statistics of activations where answer tokens are predicted, and of a·∂f/∂a with a target."""
    model = patched.model
    head = head_of(model)
    with inference(model), patched.record(DEFAULT_GROUPS[0], gradients=target is not None):
        for batch, groups in batches.on(_device(model)):
            batch["token_group"] = _token_groups(batch, groups, head)
            if target is None:
                inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_group")}
                with torch.no_grad():
                    patched.forward_layers(**inputs, use_cache=False)
            else:
                logits = _logits(model, batch, token_group=batch["token_group"])
                torch.autograd.backward(answer_target(logits, batch["labels"], target, head)[0].sum())
    return patched.statistics


def _record_weight_inputs(model: nn.Module, statistics: Statistics, batches: Batches) -> WeightInputRecorder:
    layers, head = getattr(model, "base_model", model), head_of(model)
    with inference(model), torch.no_grad(), WeightInputRecorder(model, statistics) as recorder:
        for batch, groups in batches.on(_device(model)):
            recorder.groups = _token_groups(batch, groups, head)
            layers(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            recorder.count_records()
    return recorder


def _record_squared_gradients(model: nn.Module, statistics: Statistics, batches: Batches, target: str) -> None:
    head = head_of(model)
    with inference(model), SquaredGradientRecorder(model, statistics) as recorder:
        for batch, recorder.groups in batches.on(_device(model)):
            torch.autograd.backward(record_target(_logits(model, batch), batch["labels"], target, head).sum())
            recorder.count_records()


def _record_mean_gradients(model: nn.Module, statistics: Statistics, batches: Batches, target: str) -> None:
    statistics.records += torch.tensor([len(records) for records in batches.data], device=statistics.records.device)
    head = head_of(model)
    for recorder in mean_gradient_recorders(model, statistics):
        with inference(model), recorder:
            for batch, recorder.groups in batches.on(_device(model)):
                torch.autograd.backward(record_target(_logits(model, batch), batch["labels"], target, head).sum())


def _record_integrated_gradients(model: nn.Module, statistics: Statistics, batches: Batches, target: str) -> None:
    integrated, head = IntegratedGradients(model, statistics), head_of(model)
    with inference(model):
        for batch, groups in batches.on(_device(model)):

            def forward(batch: dict[str, Tensor] = batch) -> Tensor:
                logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
                return answer_target(logits, batch["labels"], target, head)[0].sum()

            integrated.add(forward, groups, answer_mask(batch["labels"], head))


def _logits(model: nn.Module, batch: dict[str, Tensor], **more: Tensor) -> Tensor:
    """Logits that can be differentiated with respect to everything behind the embedding."""
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
    logits: Tensor = model(
        inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False, **more
    ).logits
    return logits


def _token_groups(batch: dict[str, Tensor], groups: Tensor, head: str) -> Tensor:
    """The group of each position that predicts an answer token, 0 elsewhere, [records, tokens] int8."""
    return answer_mask(batch["labels"], head).to(torch.int8) * groups[:, None].to(torch.int8)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of weights, for a while."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
