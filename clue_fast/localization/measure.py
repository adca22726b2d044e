"""localize: from a model, forget data and retain data to a selection."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from clue_fast.data import Collator, check_disjoint, encode, load_records, padding_token
from clue_fast.localization.criteria import get_criterion, score
from clue_fast.patching import Patched, patch
from clue_fast.selection import Selection, check_budget, select
from clue_fast.sites import find_sites, model_fingerprint
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 4096


def localize(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = "difference",
    fraction: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    scope: str = "layer",
    seed: int = 0,
    max_length: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    backend: str | None = None,
    progress: bool = True,
) -> Selection:
    """Selects the units in which forget and retain data conflict.

    Args:
        model: a causal language model with sites, see ``find_sites``. It comes back as it was.
        forget, retain: data sets, see ``clue_fast.data.load_records``.
        tokenizer: of the model.
        criterion: a key of ``CRITERIA``.
        fraction, count, threshold, scope: the budget, see ``select``; default the top 10 % of every layer.
        seed: of the criterion ``random``.
        max_length, tokens_per_batch, backend, progress: see ``measure``.

    Raises:
        DataError: a data set is empty, unreadable, or both share records.
        UnknownNameError: no such criterion.
        BudgetError: the budget is out of range.
        SiteError: the model has no sites.
        NonFiniteError: weights or activations are NaN or infinite.
    """
    started = time.perf_counter()
    check_budget(fraction, count=count, threshold=threshold, scope=scope)
    statistics = measure(
        model,
        forget,
        retain,
        tokenizer=tokenizer,
        criterion=criterion,
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        backend=backend,
        progress=progress,
    )
    scores = score(statistics, criterion, seed=seed, backend=backend)
    selection = select(scores, fraction, count=count, threshold=threshold, scope=scope)
    selection.source["seed"] = seed
    units = sum(site.width for site in selection.sites)
    seconds = time.perf_counter() - started
    logger.info("localize: %d of %d units by %s in %.1f s", len(selection), units, criterion, seconds)
    return selection


def measure(
    model: PreTrainedModel,
    forget: Any,
    retain: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    criterion: str = "difference",
    max_length: int = 512,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    backend: str | None = None,
    progress: bool = True,
) -> Statistics:
    """Records the statistics that a criterion needs, of forget and retain answers, in one pass over both.

    Args:
        model, forget, retain, tokenizer: see ``localize``.
        criterion: a key of ``CRITERIA``; ``random`` records nothing, ``attribution`` also runs backward.
        max_length: longer records are cut, in tokens.
        tokens_per_batch: most tokens in one forward pass, padding included.
        backend: forces a backend.
        progress: show a progress bar.
    """
    chosen = get_criterion(criterion)
    forget_records, retain_records = load_records(forget, "forget"), load_records(retain, "retain")
    check_disjoint(forget_records, retain_records)
    if not chosen.activations:
        return Statistics(find_sites(model), model_fingerprint(model))
    data = [encode(records, tokenizer, max_length) for records in (forget_records, retain_records)]
    with patch(model, backend=backend) as patched:
        return record_groups(
            patched,
            data,
            pad_token_id=padding_token(tokenizer),
            gradients=chosen.gradients,
            tokens_per_batch=tokens_per_batch,
            progress=progress,
        )


def record_groups(
    patched: Patched,
    data: Sequence[Sequence[dict[str, list[int]]]],
    *,
    pad_token_id: int,
    gradients: bool = False,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> Statistics:
    """Records encoded records by group, answer tokens only (``labels`` other than -100).

    Records of all groups are sorted by length and share batches. Without gradients only the layers run, not the
    language-model head.

    Args:
        patched: a patched causal language model.
        data: encoded records of group 1 (forget), group 2 (retain) and so on, see ``clue_fast.data.encode``.
        pad_token_id: fills up shorter records of a batch.
        gradients: also record a·∂f/∂a, f the sum of the log-odds of the answer tokens.
        tokens_per_batch: most tokens in one forward pass, padding included.
        progress: show a progress bar.
    """
    items = sorted(
        ((record, group) for group, records in enumerate(data, start=1) for record in records),
        key=lambda item: len(item[0]["input_ids"]),
        reverse=True,
    )
    model = patched.model
    device = next(model.parameters()).device
    collate = Collator(pad_token_id)
    bar = tqdm(total=len(items), desc="localize", unit="record", disable=not progress)
    with _inference(model), bar, patched.record(DEFAULT_GROUPS[0], gradients=gradients):
        for batch_items in _batches(items, tokens_per_batch):
            batch = {name: tensor.to(device) for name, tensor in collate([record for record, _ in batch_items]).items()}
            group = torch.tensor([group for _, group in batch_items], dtype=torch.int8, device=device)
            batch["token_group"] = (batch["labels"] != -100).to(torch.int8) * group[:, None]
            if gradients:
                _forward_backward(model, batch)
            else:
                _forward(patched, batch)
            bar.update(len(batch_items))
    return patched.statistics


def _forward(patched: Patched, batch: dict[str, Tensor]) -> None:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_group")}
    with torch.no_grad():
        patched.forward_layers(**inputs, use_cache=False)


def _forward_backward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Runs forward, and backward from the log-odds of the answer tokens: log p - log(1 - p) of each.

    Its gradient does not vanish where the answer is memorized and the loss is nearly zero.
    """
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()  # type: ignore[operator]
    logits = model(
        inputs_embeds=embeddings,
        attention_mask=batch["attention_mask"],
        token_group=batch["token_group"],
        use_cache=False,
    ).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    answer = labels != -100
    logits, labels = logits[answer].float(), labels[answer][:, None]
    own = logits.gather(1, labels).squeeze(1)
    others = torch.logsumexp(logits.scatter(1, labels, float("-inf")), dim=1)
    (own - others).sum().backward()


def _batches(items: Sequence[Any], tokens_per_batch: int) -> Iterator[Sequence[Any]]:
    """Cuts items, longest first, into batches of at most so many tokens, padding included."""
    start = 0
    while start < len(items):
        size = max(1, tokens_per_batch // len(items[start][0]["input_ids"]))
        yield items[start : start + size]
        start += size


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
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
