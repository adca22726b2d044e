"""Passes over encoded records: in batches by length, with a target of the answers that is differentiated.

A target is the scalar function of an answer that is differentiated to see what a unit does for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from clue_fast.data import Collator, Example, answer_mask
from clue_fast.errors import DataError, UnknownNameError
from clue_fast.internals import GIVE_BACK, give_back_memory
from clue_fast.objectives.predictions import Predictions, predict_in_one_pass
from clue_fast.sites import Site, evaluation_mode
from clue_fast.sparse.lower_layers import layers_below
from clue_fast.statistics import DEFAULT_GROUPS


@dataclass(frozen=True)
class Batches:
    """Encoded records of several groups, sorted by length, in padded batches.

    Attributes:
        data: encoded records of group 1, 2 and so on. Units are measured where the answer is predicted; or where the
            record says so, with ``counted``, a 1 or 0 for each of its tokens.
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
        """Yields batches, and the group of each of their records, int64.

        Raises:
            DataError: some records have ``counted``, and others have not.
        """
        if len({"counted" in record for records in self.data for record in records}) > 1:
            raise DataError("some records say with counted where units are measured, and others do not; give it to all")
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
                records = [record for record, _ in chosen]
                batch = collate(records)
                if "counted" in records[0]:
                    batch["counted"] = _padded([record["counted"] for record in records], batch["labels"])
                groups = torch.tensor([group for _, group in chosen], device=device)
                yield {name: tensor.to(device) for name, tensor in batch.items()}, groups
                bar.update(len(chosen))
                start += size
                give_back_memory(GIVE_BACK)


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    others = torch.logsumexp(logits.scatter(1, labels[:, None], float("-inf")), dim=1)
    return _logit(logits, labels) - others


def _logit(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(1, labels[:, None]).squeeze(1)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none")


def _probability(logits: Tensor, labels: Tensor) -> Tensor:
    return _logit(logits.softmax(dim=1), labels)


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_odds": _log_odds,
    "logit": _logit,
    "loss": _loss,
    "probability": _probability,
}
"""By name, from logits [tokens, vocabulary] float32 and labels [tokens] to one value per token."""


def check_target(name: str) -> str:
    """Returns the name of a target. Raises UnknownNameError."""
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    return name


def target_of(predictions: Predictions, target: str) -> Tensor:
    """The target of every answer token, where it is predicted, [answer tokens] float32, without keeping logits.

    The gradients of ``loss`` and ``probability`` vanish where an answer is memorized; those of ``log_odds``,
    log p - log(1 - p), and ``logit`` do not.

    Args:
        predictions: of a batch.
        target: a key of ``TARGETS``.

    Raises:
        UnknownNameError: there is no such target.
    """
    return predictions.by_label(TARGETS[check_target(target)])


def predictions_of(model: nn.Module, batch: dict[str, Tensor], **more: Tensor) -> Predictions:
    """The predictions of a model for a batch, which may say which tokens are counted too."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return predict_in_one_pass(model, {**inputs, **more})


@contextmanager
def differentiable(model: nn.Module, sites: Iterable[Site]) -> Iterator[None]:
    """Has what goes into the lowest layer with sites need a gradient, for as long as the context lasts.

    Nothing below that is kept for the backward pass, nor run backward. In ``inference``, in which no weight needs one.
    """
    below = layers_below(model, (owned.parameter for site in sites for owned in site.slices))
    source = below[-1] if below else model.get_input_embeddings()  # type: ignore[operator]

    def require(_: nn.Module, __: Any, output: Any) -> None:
        (output[0] if isinstance(output, tuple) else output).requires_grad_()

    handle = source.register_forward_hook(require)
    try:
        yield
    finally:
        handle.remove()


def _padded(rows: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Rows of 0 and 1 as a mask in the shape of another tensor, false behind the end of each."""
    mask = torch.zeros_like(like, dtype=torch.bool)
    for number, row in enumerate(rows):
        mask[number, : len(row)] = torch.tensor(row, dtype=torch.bool, device=like.device)
    return mask


def counted_mask(batch: dict[str, Tensor], head: str) -> Tensor:
    """Where units are measured, bool [records, tokens]: where an answer token is predicted, unless the records say."""
    return batch["counted"] if "counted" in batch else answer_mask(batch["labels"], head)


def token_groups(batch: dict[str, Tensor], groups: Tensor, head: str) -> Tensor:
    """The group of each position where units are measured, 0 elsewhere, [records, tokens] int8."""
    return counted_mask(batch, head).to(torch.int8) * groups[:, None].to(torch.int8)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of weights, for a while."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
