"""Proof that training changed what it should and nothing else: a model compared with its past, bit by bit."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping

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


def snapshot(model: nn.Module, folder: str | os.PathLike[str] | None = None) -> Mapping[str, Tensor]:
    """Returns a CPU copy of every weight and buffer, also of those that no checkpoint holds, by name.

    Whole, also where FSDP2 shards the model; then every process has to call this, and what compares with it.

    Args:
        model: as it is now.
        folder: for a file that has no name and is gone with the copy, which then takes no memory; default is memory.

    Raises:
        OSError: the folder cannot be written, or has no room.
    """
    tensors = ((name, whole(tensor.detach())) for name, tensor in _tensors(model))
    if folder is not None:
        return _Stored(tensors, folder)
    return {name: tensor.cpu().clone() for name, tensor in tensors}


class _Stored(Mapping[str, Tensor]):
    """Tensors in a file, each of which is read whenever it is asked for."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], folder: str | os.PathLike[str]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._kinds: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
        for name, tensor in tensors:
            self._kinds[name] = self._file.tell(), tensor.shape, tensor.dtype
            self._file.write(_bytes(tensor.cpu().contiguous()))
        self._file.flush()

    def __getitem__(self, name: str) -> Tensor:
        start, shape, dtype = self._kinds[name]
        tensor = torch.empty(shape, dtype=dtype, device="cpu")
        self._file.seek(start)
        if self._file.readinto(_bytes(tensor)) != tensor.nbytes:
            raise OSError(f"the file with {name} as it was has been cut off")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)


def changed_outside(before: Mapping[str, Tensor], model: nn.Module, selection: Selection) -> int:
    """Returns how many numbers outside the selection have other bits than in the snapshot. It should be 0.

    Bits, not values: -0.0 is not 0.0 here, and NaN with the same payload is equal to itself.

    Raises:
        SparseError: the snapshot is of another model.
    """
    return _changed(before, model, selection, inside=False)


def changed_inside(before: Mapping[str, Tensor], model: nn.Module, selection: Selection) -> int:
    """Returns how many selected weights have other bits than in the snapshot. It should be nearly all.

    Raises:
        SparseError: the snapshot is of another model.
    """
    return _changed(before, model, selection, inside=True)


def _changed(before: Mapping[str, Tensor], model: nn.Module, selection: Selection, inside: bool) -> int:
    now = dict(_tensors(model))
    if before.keys() != now.keys():
        raise SparseError("the snapshot is of another model: names differ")
    changed = 0
    for name, tensor in now.items():
        was = before[name]
        if (was.shape, was.dtype) != (tensor.shape, tensor.dtype):
            raise SparseError(f"the snapshot is of another model: shape or dtype of {name} differs")
        differs = _bits(was) != _bits(whole(tensor.detach()).cpu())
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


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data
