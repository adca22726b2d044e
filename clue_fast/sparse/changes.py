"""Proof that training changed what it should and nothing else: a model compared with its past, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clue_fast.errors import SparseError
from clue_fast.selection import Selection
from clue_fast.sparse.shards import whole
from clue_fast.sparse.slices import trainable_slices

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def owned_weights(model: nn.Module, selection: Selection) -> int:
    """Returns how many weights the selected units own, those that train."""
    owned_by = ((len(selection.units(site)), owned) for site in selection.sites for owned in site.slices)
    weights = ((units * owned.size, owned, owned.of(model.get_parameter(owned.parameter))) for units, owned in owned_by)
    return sum(slices * weight.numel() // weight.shape[owned.dim] for slices, owned, weight in weights)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Returns a CPU copy of every weight and buffer, also of those that no checkpoint holds, by name.

    Whole, also where FSDP2 shards the model; then every process has to call this, and what compares with it.
    """
    return {name: whole(tensor.detach()).cpu().clone() for name, tensor in _tensors(model)}


def changed_outside(before: dict[str, Tensor], model: nn.Module, selection: Selection) -> int:
    """Returns how many numbers outside the selection have other bits than in the snapshot. It should be 0.

    Bits, not values: -0.0 is not 0.0 here, and NaN with the same payload is equal to itself.

    Raises:
        SparseError: the snapshot is of another model.
    """
    return _changed(before, model, selection, inside=False)


def changed_inside(before: dict[str, Tensor], model: nn.Module, selection: Selection) -> int:
    """Returns how many selected weights have other bits than in the snapshot. It should be nearly all.

    Raises:
        SparseError: the snapshot is of another model.
    """
    return _changed(before, model, selection, inside=True)


def _changed(before: dict[str, Tensor], model: nn.Module, selection: Selection, inside: bool) -> int:
    now = dict(_tensors(model))
    kinds = [{name: (t.shape, t.dtype) for name, t in tensors.items()} for tensors in (before, now)]
    if kinds[0] != kinds[1]:
        raise SparseError("the snapshot is of another model: names, shapes or dtypes differ")
    changed = 0
    for name, tensor in now.items():
        differs = _bits(before[name]) != _bits(whole(tensor.detach()).cpu())
        every = int(torch.count_nonzero(differs))  # a sum would be made of eight bytes a number
        outside = int(torch.count_nonzero(_without_selected(differs, selection, name))) if every else 0
        changed += every - outside if inside else outside
    return changed


def _without_selected(differs: Tensor, selection: Selection, name: str) -> Tensor:
    """The same tensor, in which the numbers of a parameter that belong to selected units are set to false."""
    for site in selection.sites:
        for owned in site.slices:
            if owned.parameter == name:
                owned.of(differs).index_fill_(owned.dim, owned.index(selection.units(site)), False)
    return differs


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    values = {id(trained.values) for trained in trainable_slices(model)}
    parameters = [(name, p) for name, p in model.named_parameters() if id(p) not in values]
    return [*parameters, *model.named_buffers()]


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])
