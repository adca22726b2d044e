"""Records in one row, one behind another without padding, kept apart by their positions.

transformers gives the records of such a row an attention each where positions begin anew, as long as nobody gives a
mask: FlashAttention then looks at no other record at all, where other implementations mask them. A model whose layers
carry a state from token to token, or whose positions are not those that it is given, knows nothing of it, so that every
model is tried before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.data import IGNORED_LABEL, head_of
from clue_fast.data.collator import has_head, vocabulary_size
from clue_fast.errors import ObjectiveError
from clue_fast.internals import evaluation_mode, unwrap
from clue_fast.objectives.predictions import Batch

TRIED = 6, 7
"""How many tokens the two records have that a model is tried with."""

INSTEAD = "leave packed_tokens out, which pads records in passes of similar length"


def pack(batch: Batch) -> dict[str, Tensor]:
    """Puts the records of a batch, padded on the right, into one row.

    Returns:
        The inputs of a model and labels, [1, tokens] each: no mask, ``position_ids`` that begin at 0 with each record,
        and no label for the first token of a record, which the last one of the record before would predict.
    """
    attended = batch["attention_mask"] != 0
    places = torch.arange(attended.shape[1], device=attended.device).expand(attended.shape)
    row = {name: tensor[attended][None] for name, tensor in batch.items() if name != "attention_mask"}
    row["position_ids"] = places[attended][None]
    row["labels"] = row["labels"].masked_fill(row["position_ids"] == 0, IGNORED_LABEL)
    return row


def rows_of(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Indices of records in rows of at most so many tokens: the longest first, each into the first row that has room.

    A record that is longer has a row of its own.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = next((row for row, left in enumerate(room) if lengths[index] <= left), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(most_tokens)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def check_packing(model: nn.Module) -> None:
    """Tries a model with two records of random tokens in one row.

    What it predicts in the second must have no gradient by the embeddings of the first, exactly, and be what it
    predicts in the second alone, in half of the digits of its dtype.

    Raises:
        ObjectiveError: it is not so, or the model has no causal head or takes no positions.
    """
    name = type(unwrap(model)).__name__
    if not has_head(model) or head_of(model) != "causal":
        raise ObjectiveError(f"{name} has no causal head, so that records cannot be packed for it; {INSTEAD}")
    try:
        row, alone, reached = _try(model)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(f"{name} takes no row of records with positions ({error}); {INSTEAD}") from error
    if bool((reached != 0).any()):
        raise ObjectiveError(f"{name} does not keep records apart that stand in one row; {INSTEAD}")
    if (row - alone).norm() > torch.finfo(alone.dtype).eps ** 0.5 * alone.norm():
        raise ObjectiveError(f"{name} predicts something else in a record that stands behind another; {INSTEAD}")


def _try(model: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in the second of two records in one row, those in it alone, and the gradient by the first one's input."""
    generator = torch.Generator().manual_seed(0)
    device = next(model.parameters()).device
    first, second = TRIED
    shape = (1, first + second)
    tokens = torch.randint(vocabulary_size(model) or 2, shape, generator=generator, device="cpu").to(device)
    positions = torch.tensor([[*range(first), *range(second)]], device=device)
    embedded: list[Tensor] = []

    def differentiate(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    inner: Any = unwrap(model)
    handle = inner.get_input_embeddings().register_forward_hook(differentiate)
    try:
        with evaluation_mode(model), torch.enable_grad():
            alone = inner(input_ids=tokens[:, first:], use_cache=False).logits.detach()
            row = inner(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, first:]
            weights = torch.randn(row.shape, generator=generator, device="cpu").to(row)
            (gradient,) = torch.autograd.grad((row * weights).sum(), embedded[-1])
    finally:
        handle.remove()
    return row.detach(), alone, gradient[:, :first]
