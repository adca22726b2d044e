"""How the batches of a step are run: joined, in passes of similar length, so that little is padded.

Or, where that is asked for, packed into rows without padding, see ``clue_fast.objectives.packing``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.data import IGNORED_LABEL, head_of, is_padded_right
from clue_fast.errors import DataError, ObjectiveError
from clue_fast.internals import has_no_data
from clue_fast.objectives.packing import INSTEAD, pack, rows_of
from clue_fast.objectives.predictions import Batch, Predictions, predictions_by_set
from clue_fast.sites import unwrap

Announce: TypeAlias = "Callable[[int, int, int], None]"
"""Called with how many records of a pass are to be forgotten, how many there are, and how many tokens each has."""

Text: TypeAlias = "Sequence[tuple[int, ...]]"
"""The tokens of each record, without padding."""

Around: TypeAlias = "Callable[[nn.Module, Batch, Text | None], AbstractContextManager[None]]"
"""Gives, of a model, the inputs of a pass and the tokens of its records, what is entered around it."""

# What the tokens that are added to make two batches equally long are filled with; 0 is masked from attention.
_FILL = {"labels": IGNORED_LABEL}

PASS_TOKENS = {"cpu": 32, "cuda": 1024}
"""A further pass costs about as much as so many tokens: it reads every weight again."""


def predict(
    model: nn.Module,
    batches: Mapping[str, Batch],
    announce: Announce | None = None,
    around: Around | None = None,
) -> dict[str, Predictions]:
    """Runs all batches, and returns the predictions for each by its name.

    Args:
        model: see ``clue_fast.data.collator`` for its heads.
        batches: of records; those to be kept are called "retain", and come last.
        announce: called before each forward pass with how many of its records, which come first, are to be forgotten;
            how many there are; and how many tokens each of them has.
        around: called with the model, the inputs of each forward pass and the tokens of its records, None where they
            are no text that is padded on the right; what it returns is entered around the pass.

    Raises:
        ObjectiveError: the model returns no logits, or not at the positions of the labels.
        DataError: see ``join``.
    """
    return run_passes(model, passes_of(model, batches), announce, around)


def run_passes(
    model: nn.Module, passes: Sequence[Pass], announce: Announce | None = None, around: Around | None = None
) -> dict[str, Predictions]:
    """Runs all passes of a step, see ``predict``."""
    found = [one.run(model, announce, around) for one in passes]
    if len(found) == 1:
        return found[0]
    return {name: _merged([of[name] for of in found], [one.records[name] for one in passes]) for name in found[0]}


@dataclass(frozen=True)
class Pass:
    """A forward pass over some records of the batches of a step.

    Attributes:
        batch: their inputs and labels, those of one set behind those of another.
        records: which of its set they are, ascending, by the name of the set.
        text: the tokens of each, where they are text that is padded on the right, and otherwise None.
        packed: whether they run in one row; then either all or none of them are to be forgotten.
    """

    batch: Batch
    records: Mapping[str, Sequence[int]]
    text: Text | None = None
    packed: bool = False

    def run(
        self, model: nn.Module, announce: Announce | None = None, around: Around | None = None
    ) -> dict[str, Predictions]:
        """Returns the predictions for its records, by the name of their set, see ``predict``."""
        sizes = {name: len(records) for name, records in self.records.items()}
        forget = sum(size for name, size in sizes.items() if name != "retain")
        inputs = pack(self.batch) if self.packed else self.batch
        with nullcontext() if around is None else around(model, inputs, self.text):
            if announce is not None:
                ids, rows = inputs.get("input_ids"), len(inputs["labels"])
                announce(min(forget, rows), rows, 1 if ids is None else ids.shape[1])
            return predictions_by_set(model, self.batch, sizes, inputs)

    def of_labels(self, name: str, values: Tensor, counted: Tensor) -> Tensor:
        """Returns what belongs to its records of something that every label of a set has, [labels, ...].

        Args:
            name: of the set.
            values: of all labels of the set.
            counted: [records, positions] bool, which positions of the set predict them.
        """
        own = torch.zeros_like(counted)
        own[list(self.records[name])] = True
        return values[own[counted]]


def passes_of(model: nn.Module, batches: Mapping[str, Batch], packed_tokens: int | None = None) -> list[Pass]:
    """Returns the passes in which a model runs over the batches of a step, see ``predict``.

    Args:
        model, batches: see there.
        packed_tokens: of a row, into which records are packed, those to be kept apart from all others; None: they are
            padded.

    Raises:
        ObjectiveError: they cannot be packed.
        DataError: see ``join``.
    """
    joined = join(list(batches.values()))
    sizes = [len(batch["labels"]) for batch in batches.values()]
    found = []
    head = head_of(model, joined["labels"])
    text = _text(joined) if head == "causal" else None
    if packed_tokens is None:
        passes = _passes(model, joined, head, text)
    else:
        forget = sum(size for name, size in zip(batches, sizes, strict=True) if name != "retain")
        passes = [*_rows(model, joined, head, text, forget, packed_tokens)]
    for chosen in passes:
        records, first = {}, 0
        for name, size in zip(batches, sizes, strict=True):
            of_set = range(first, first + size)
            records[name] = [record - first for record in (of_set if chosen is None else chosen) if record in of_set]
            first += size
        own = text if text is None or chosen is None else [text[record] for record in chosen]
        batch = joined if chosen is None or own is None else _some(joined, chosen, max(map(len, own)))
        found.append(Pass(batch, records, own, packed_tokens is not None))
    return found


def _text(joined: Batch) -> Text | None:
    """The tokens of records that are text, padded on the right; None for others. A GPU is waited for once."""
    ids, mask = joined.get("input_ids"), joined.get("attention_mask")
    if ids is None or mask is None or has_no_data(mask) or ids.shape != mask.shape:
        return None
    ids, mask = torch.stack((ids, mask.to(ids.dtype))).cpu()
    if not is_padded_right(mask):
        return None
    return [tuple(row[:length]) for row, length in zip(ids.tolist(), mask.sum(-1).tolist(), strict=True)]


def _passes(model: nn.Module, joined: Batch, head: str, text: Text | None) -> list[list[int] | None]:
    """The records of each forward pass, ascending; None for one pass over all."""
    if text is None:
        return [None]
    kind = joined["labels"].device.type
    passes = passes_by_length(list(map(len, text)), PASS_TOKENS.get(kind, PASS_TOKENS["cuda"]))
    if len(passes) == 1 or _why_together(model, joined, head, text):
        return [None]
    return [sorted(records) for records in passes]


def _rows(
    model: nn.Module, joined: Batch, head: str, text: Text | None, forget: int, most_tokens: int
) -> list[list[int]]:
    """The records of each row, ascending: of the first ones, which are to be forgotten, and of the others."""
    why = _why_together(model, joined, head, text)
    if why or text is None:
        raise ObjectiveError(f"the records of a step cannot be packed: {why}; {INSTEAD}")
    lengths = list(map(len, text))
    sets = range(forget), range(forget, len(lengths))
    return [sorted(of[place] for place in row) for of in sets for row in rows_of([lengths[i] for i in of], most_tokens)]


def _why_together(model: nn.Module, joined: Batch, head: str, text: Text | None) -> str:
    """Why all records run in one pass, since several are not known to change nothing; "" where they are.

    They are for a causal model that is not wrapped, so that no other process waits for a pass, without checkpointing,
    which runs layers again when another pass is under way, on records that are padded on the right.
    """
    mask = joined.get("attention_mask")
    if head != "causal":
        return f"{type(unwrap(model)).__name__} has a {head} head"
    if mask is None or has_no_data(mask):
        return "they have no mask, or one without data"
    if model is not unwrap(model):
        return f"other processes may wait for the passes of a {type(model).__name__}"
    if others := set(joined) - {"input_ids", "attention_mask", "labels", "token_group"}:
        return f"they have {', '.join(sorted(others))}"
    # Of what stands in the modules themselves, since it looks at all of them.
    if any(vars(module).get("gradient_checkpointing", False) for module in model.modules()):
        return "gradient checkpointing runs layers again when another row is under way"
    return "they are not padded on the right" if text is None else ""


def passes_by_length(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Indices in passes of similar length, longest first: a new one wherever the padding would be more than its cost.

    Args:
        lengths: in tokens.
        cost: of a further pass, in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    passes: list[list[int]] = [[]]
    padding = 0
    for index in order:
        if passes[-1]:
            padding += lengths[passes[-1][0]] - lengths[index]
        if padding > cost:
            passes.append([])
            padding = 0
        passes[-1].append(index)
    return passes


def _some(joined: Batch, records: Sequence[int], longest: int) -> dict[str, Tensor]:
    """Some records, the longest of which has so many tokens, without padding that none of them needs."""
    index = torch.tensor(records, device=joined["labels"].device)
    own = {name: tensor[index] for name, tensor in joined.items()}
    return {name: tensor[:, :longest] for name, tensor in own.items()}


def _merged(found: Sequence[Predictions], records: Sequence[Sequence[int]]) -> Predictions:
    """The predictions for all records of a set, of those of each pass and which of the set its records are."""
    device = found[0].counted.device
    order = torch.tensor([record for of_pass in records for record in of_pass], device=device)
    longest = max(own.counted.shape[1] for own in found)
    counted = torch.cat([functional.pad(own.counted, (0, longest - own.counted.shape[1])) for own in found])
    label = order.repeat_interleave(counted.sum(-1)).argsort(stable=True)
    states, labels = (torch.cat([getattr(own, name) for own in found])[label] for name in ("states", "labels"))
    return Predictions(states, labels, counted[order.argsort()], found[-1].head)


def join(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Stacks batches of records into one, padded on the right to the longest.

    Raises:
        DataError: the batches hold different inputs, or inputs that cannot be padded to one shape.
    """
    if len(batches) == 1:
        return dict(batches[0])
    names = [set(batch) for batch in batches]
    odd = set[str]().union(*names) - names[0].intersection(*names)
    if odd:
        raise DataError(f"{', '.join(sorted(odd))} is an input of some batches only; give all sets the same inputs")
    return {name: _stack(name, [batch[name] for batch in batches]) for name in batches[0]}


def _stack(name: str, tensors: list[Tensor]) -> Tensor:
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        if any(len(shape) != 1 for shape in shapes):
            raise DataError(f"{name} has the shapes {sorted(shapes)} in the batches of a step; make them equal")
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [functional.pad(t, (0, longest - t.shape[1]), value=_FILL.get(name, 0)) for t in tensors]
    return torch.cat(tensors)
