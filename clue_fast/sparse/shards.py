"""Which part of the selected slices a process owns where FSDP2 shards the weights, and what processes tell each other.

FSDP2 gives every process a run of the first dimension of a weight. The values of slices are cut along their own first
dimension, so that each process owns those whose numbers lie in its run: of selected rows those that it holds, of
selected columns its rows of each, of a stack of experts those that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.fsdp import FSDPModule
    from torch.utils.hooks import RemovableHandle


@dataclass(eq=False)
class Shard:
    """The part of one parameter's slices that a process owns.

    Attributes:
        group: the processes that share the weight.
        unit: the module that FSDP2 gathers as one, which holds the parameter.
        first: where this process's run of the parameter begins along its first dimension.
        bounds: where the part of each process begins in the first dimension of the values, and the end of the last.
        leaf: shaped as the values of all processes together, without storage; the backward fills its gradient.
        gathered: the whole parameter that the last forward pass read; FSDP2 keeps it, without storage by now.
        hooks: on the unit and its layers, that see to the exchange of gradients.
    """

    group: ProcessGroup
    unit: FSDPModule
    first: int
    bounds: tuple[int, ...]
    leaf: nn.Parameter = field(repr=False)
    gathered: Tensor | None = field(default=None, repr=False)
    hooks: Sequence[RemovableHandle] = field(default=(), repr=False)

    @property
    def rank(self) -> int:
        """Number of this process among those that share the weight."""
        return distributed.get_rank(self.group)

    @property
    def part(self) -> slice:
        """What this process owns of the first dimension of the values."""
        return slice(*self.bounds[self.rank : self.rank + 2])

    @property
    def sizes(self) -> list[int]:
        """How much of the first dimension of the values each process owns."""
        return [end - begin for begin, end in zip(self.bounds, self.bounds[1:], strict=False)]

    def held(self, module: nn.Module, name: str) -> Tensor:
        """Returns this process's run of a parameter of the unit, as it lies in memory; none of it is whole after."""
        parameter = getattr(module, name)
        if not hasattr(parameter, "placements"):
            self.unit.reshard()
            parameter = getattr(module, name)
        with torch.no_grad():
            return own_part(parameter)

    def gather(self, own: Tensor) -> Tensor:
        """Returns what all processes have of something shaped as the values, whole; every process has to call it."""
        if len(self.sizes) == 1:
            return own
        whole = own.new_empty(self.leaf.shape)
        numbers = [size * self.leaf[0].numel() for size in self.sizes]
        sent = own.reshape(-1).repeat(len(numbers))
        distributed.all_to_all_single(whole.view(-1), sent, numbers, [own.numel()] * len(numbers), group=self.group)
        return whole


def own_part(tensor: Tensor) -> Tensor:
    """Returns what this process has of a tensor, which may be sharded."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def whole(tensor: Tensor) -> Tensor:
    """Returns a tensor with what other processes have of it, every one of which has to call this if it is sharded."""
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def without_storage(shape: Sequence[int], device: torch.device) -> Tensor:
    """Returns float32 of a shape that nobody reads: a single number, expanded."""
    return torch.zeros((), device=device).expand(*shape)


def sum_at_owners(sent: Tensor, sizes: Sequence[int], group: ProcessGroup) -> Tensor:
    """Sends each process its part, and returns the sum of what all of them have sent to this one.

    The sum is taken in the order of the processes, whatever network lies between them, so that its bits are those of
    one process that adds up the same numbers one after another.

    Args:
        sent: one-dimensional; the parts of all processes, in their order.
        sizes: how long the part of each process is; the same on every process.
        group: every process of which has to call this.
    """
    if len(sizes) == 1:
        return sent
    own = sizes[distributed.get_rank(group)]
    received = sent.new_empty(len(sizes) * own)
    distributed.all_to_all_single(received, sent, [own] * len(sizes), list(sizes), group=group)
    first: Tensor
    first, *others = received.view(len(sizes), own)
    for other in others:
        first += other
    return first


def any_of_all(flags: Sequence[bool], group: ProcessGroup, device: torch.device) -> list[bool]:
    """Returns for each flag whether it is set on any process; every process has to call this."""
    found = torch.tensor(flags, dtype=torch.float32, device=device)
    distributed.all_reduce(found, distributed.ReduceOp.MAX, group)
    return [bool(flag) for flag in found.tolist()]


def norm_of_all(gradients: Iterable[tuple[Tensor, Shard | None]]) -> Tensor:
    """Returns the norm of gradients, those of the parts that other processes own included; every one has to call this.

    Args:
        gradients: each with the shard of its slices; None for all where this process has them all.
    """
    found = list(gradients)
    groups = [shard.group for _, shard in found if shard is not None]
    norm = torch.nn.utils.get_total_norm([gradient for gradient, _ in found])
    if groups:
        squares = norm.double().square()
        distributed.all_reduce(squares, group=groups[0])
        norm = squares.sqrt().to(norm.dtype)
    return norm
