"""Selected units train while FSDP2 shards the model: who owns which slices, and when their gradients are added up.

``fully_shard`` stands in place of torch's. The weights go to FSDP2, which gathers them for a pass; the values of the
slices do not: each process keeps those of its own run of every weight. The backward makes the gradient of all selected
slices, as it does on one process. At the end of the backward of a unit, a layer as a rule, the processes exchange what
they found and each adds up its own part. Every process takes part in every exchange, whatever its records train.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clue_fast.errors import SparseError
from clue_fast.internals import after_backward
from clue_fast.selection import CATEGORIES, CONFLICT
from clue_fast.sparse.modules import SparseModule
from clue_fast.sparse.shards import Shard, sum_at_owners, without_storage
from clue_fast.sparse.slices import SHARD_AFTER, TrainableSlice, is_sharded, trainable_slices, with_history

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy


def fully_shard(
    module: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    reshard_after_forward: bool | int | None = None,
    mp_policy: MixedPrecisionPolicy | None = None,
    ignored_params: Iterable[nn.Parameter] = (),
) -> FSDPModule:
    """``torch.distributed.fsdp.fully_shard`` for a sparse model: call it in its place, on each layer, then on the rest.

    Of the selected slices in the module every process keeps the values, the original, the gradient and the optimizer
    state of those in its own run of the weights. Gradients are the mean over the processes, as FSDP2 takes it, added up
    in their order in every backward pass. Call it after ``sparsify`` and before an optimizer is made.

    Args:
        module: a layer of the model, or the model.
        mesh: of one dimension; by default all processes.
        reshard_after_forward, mp_policy, ignored_params: as for torch's. Weights that are gathered in less precision
            train to the bits of a model in that precision with master weights.

    Returns:
        The module, changed in place.

    Raises:
        SparseError: the mesh has several dimensions, the module is a single sparse layer, is sharded already, has
            gradients, or holds its original weights; then nothing has changed.
    """
    from torch.distributed import fsdp

    slices = [trained for trained in trainable_slices(module) if trained.shard is None]
    ignored = {*ignored_params, *(trained.values for trained in trainable_slices(module))}
    _check(module, slices, mesh, ignored)
    shapes = [trained.values.shape for trained in slices]
    unit: FSDPModule = fsdp.fully_shard(
        module,
        mesh=mesh,
        reshard_after_forward=reshard_after_forward,
        mp_policy=mp_policy or fsdp.MixedPrecisionPolicy(),
        ignored_params=ignored,
    )
    for trained, shape in zip(slices, shapes, strict=True):
        trained.keep_part(_shard(trained, unit, shape))
    if slices:
        Exchange(module, slices)
    return unit


def _check(
    module: nn.Module, slices: list[TrainableSlice], mesh: DeviceMesh | None, ignored: set[nn.Parameter]
) -> None:
    from torch.distributed.fsdp import FSDPModule

    if mesh is not None and mesh.ndim != 1:
        raise SparseError(f"the mesh has {mesh.ndim} dimensions; give it one, over which the weights are sharded")
    if isinstance(module, SparseModule):
        path = module.trainable_slices[0].module_path
        raise SparseError(f"{path} trains selected weights; shard the layer that holds it, or the whole model")
    if isinstance(module, FSDPModule):
        raise SparseError(f"the {type(module).__name__} is sharded already; {SHARD_AFTER}")
    for trained in slices:
        if is_sharded(trained.parameter) or is_sharded(getattr(trained.module, trained.values_name)):
            raise SparseError(f"{trained.path} is sharded already; {SHARD_AFTER}")
        if trained.parameter in ignored:
            raise SparseError(f"{trained.path} is in ignored_params, and trains; leave it out of them")
        if trained.swapped:
            raise SparseError(f"{trained.path} holds its original weights; shard the model outside Sparse.original()")
        if trained.values.grad is not None:
            raise SparseError(f"{trained.path} has a gradient already; shard the model before the first backward pass")


def _shard(trained: TrainableSlice, unit: FSDPModule, shape: torch.Size) -> Shard:
    """The part of slices, of a shape in all, whose parameter has just been sharded."""
    parameter: Any = trained.parameter
    mesh = parameter.device_mesh
    rows = parameter.shape[0]
    run = -(-rows // mesh.size())
    starts = [min(rank * run, rows) for rank in range(mesh.size() + 1)]
    if trained.expert_index is not None:  # whoever holds the expert has all of its slices
        bounds = [shape[0] if start > trained.expert_index else 0 for start in starts]
    elif trained.dim == 0:
        bounds = torch.searchsorted(trained.index.cpu(), torch.tensor(starts, device="cpu")).tolist()
    else:
        bounds = starts
    device = parameter.to_local().device
    leaf = nn.Parameter(without_storage(shape, device), requires_grad=trained.values.requires_grad)
    return Shard(mesh.get_group(), unit, starts[mesh.get_local_rank()], tuple(bounds), leaf)


class Exchange:
    """Adds up the gradients of one unit's slices over the processes, at the end of its backward.

    A unit whose input needs no gradient has no such end of its own: then at the end of the whole backward pass.

    Args:
        module: the unit.
        slices: those in it, sharded.
    """

    def __init__(self, module: nn.Module, slices: list[TrainableSlice]) -> None:
        self.slices = slices
        shard = slices[0].shard
        assert shard is not None
        self.group: ProcessGroup = shard.group
        self._due = False
        hooks = [module.register_forward_pre_hook(self._mark_end, with_kwargs=True)]
        hooks += [layer.register_forward_hook(self._mark_begin) for layer in {one.module: None for one in slices}]
        for trained in slices:
            assert trained.shard is not None
            trained.shard.hooks = hooks

    def _mark_begin(self, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Has the backward of a sparse layer ask for an exchange, also if no record of this process trains it."""
        slices: list[TrainableSlice] = [one for one in self.slices if one.module is layer]
        for trained in slices:
            assert trained.shard is not None
            trained.shard.gathered = trained.parameter
        leaves = [trained.leaf for trained in slices if trained.leaf.requires_grad]
        if not leaves or not torch.is_grad_enabled():
            return out
        begun: Tensor = _Begin.apply(out, self._begin, *leaves)  # type: ignore[no-untyped-call]
        return begun

    def _mark_end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Has the backward of the unit exchange gradients once it has reached the inputs."""
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        if not given or not torch.is_grad_enabled():
            return args, kwargs
        same = dict(zip(map(id, given), _End.apply(self._end, *given), strict=True))  # type: ignore[no-untyped-call]
        return (
            tuple(same.get(id(value), value) for value in args),
            {name: same.get(id(value), value) for name, value in kwargs.items()},
        )

    def _begin(self) -> None:
        self._due = True
        after_backward(self._end)

    def _end(self) -> None:
        if self._due:
            self._due = False
            self._exchange([trained for trained in self.slices if trained.leaf.requires_grad])

    @torch.no_grad()
    def _exchange(self, slices: list[TrainableSlice]) -> None:
        """Gives each of the slices the gradient of its own part: the mean over the processes.

        What is sent to each of them: for all slices whether there is a gradient, then its part of the gradients. So
        that slices that no record has trained, such as those of an expert that no token chose, get none.
        """
        shards = [trained.shard for trained in slices if trained.shard is not None]
        ranks, own = len(shards[0].sizes), shards[0].rank
        lengths = [[size * shard.leaf[0].numel() for size in shard.sizes] for shard in shards]
        gradients = [shard.leaf.grad for shard in shards]
        for shard in shards:
            shard.leaf.grad = None
        found = torch.tensor([float(gradient is not None) for gradient in gradients], device=shards[0].leaf.device)
        sent: list[Tensor] = []
        for rank in range(ranks):
            sent.append(found)
            for shard, gradient, length in zip(shards, gradients, lengths, strict=True):
                if gradient is None:
                    sent.append(found.new_zeros(length[rank]))
                else:
                    sent.append(gradient[shard.bounds[rank] : shard.bounds[rank + 1]].reshape(-1))
        sizes = [len(slices) + sum(length[rank] for length in lengths) for rank in range(ranks)]
        joined = torch.cat(sent)
        del sent, gradients, gradient  # the exchange holds them twice already
        total = sum_at_owners(joined, sizes, self.group)
        parts = torch.split(total[len(slices) :] / ranks, [length[own] for length in lengths])
        trains = [True] * len(slices)
        if not all(map(_always_trains, slices)):  # on a GPU this waits for the exchange
            trains = total[: len(slices)].bool().tolist()
        for trained, part, some in zip(slices, parts, trains, strict=True):
            if some:
                part = part.view(trained.values.shape)
                trained.values.grad = part if trained.values.grad is None else trained.values.grad + part


def _always_trains(trained: TrainableSlice) -> bool:
    """Whether every batch trains the slices, whatever its records are and whichever experts they meet."""
    return trained.category == CATEGORIES[CONFLICT] and trained.expert_index is None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, begin: Callable[[], None], *leaves: Tensor) -> Tensor:
        ctx.begin, ctx.leaves = begin, len(leaves)
        return with_history(ctx, out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.begin()
        return grad, None, *[None] * ctx.leaves


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, end: Callable[[], None], *given: Tensor) -> tuple[Tensor, ...]:
        ctx.end = end
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.end()
        return None, *grads
