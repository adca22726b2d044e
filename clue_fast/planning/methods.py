"""Ways to train: the selected units, and beside them what people do otherwise, on a model without data.

Each says which numbers it trains and how many bytes each of them takes, and prepares a model for a step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from clue_fast.selection import Selection
from clue_fast.sites import Survey
from clue_fast.sites.projection import projection_of
from clue_fast.sparse.modules import inject, limit_checkpointing
from clue_fast.sparse.slices import TrainableSlice
from clue_fast.sparse.slices import plan as plan_slices
from clue_fast.trainer.sparse_training import fused
from clue_fast.trainer.tracing import copy_without_data, without_data

FLOAT32 = 4


@dataclass(frozen=True)
class Trained:
    """What trains of a model, and how many bytes it takes.

    Attributes:
        path: of the parameter.
        numbers: how many of its numbers train.
        values: bytes of each that are kept beside the weight, such as a float32 value.
        original: bytes of each as it was before.
        gradient, state: bytes of each while it trains.
    """

    path: str
    numbers: int
    values: int
    original: int
    gradient: int
    state: int


@dataclass
class Prepared:
    """A model without data that is ready for a step.

    Attributes:
        model: to be called.
        trained: what trains of it.
        kept: tensors that there are before a step, beside parameters and buffers.
        adapters: that are left out while the original model is asked.
    """

    model: nn.Module
    trained: list[Trained]
    kept: list[Tensor] = field(default_factory=list)
    adapters: list[Adapter] = field(default_factory=list)


class Method(Protocol):
    """A way to train."""

    @property
    def name(self) -> str:
        """For tables."""

    @property
    def copies_original(self) -> bool:
        """Whether objectives that ask the original model need a copy of it."""

    def weight_bytes(self, parameter: Tensor) -> int:
        """Bytes of a parameter of the whole model."""

    def prepare(self, model: nn.Module) -> AbstractContextManager[Prepared]:
        """A context that gives a model ready for a step, made from one on the meta device, which stays as it was."""


@dataclass(frozen=True)
class SelectedUnits:
    """``sparsify`` and ``SparseAdamW`` on a patched model, as ``UnlearnTrainer`` has it.

    Attributes:
        selection: of units of the model that is prepared.
        found: its sites.
        master_weights: see ``SparseAdamW``.
    """

    selection: Selection
    found: Survey
    master_weights: bool = True
    name: str = "selected units"
    copies_original: bool = False

    def weight_bytes(self, parameter: Tensor) -> int:
        """Those of the parameter."""
        return parameter.nbytes

    @contextmanager
    def prepare(self, model: nn.Module) -> Iterator[Prepared]:
        """The model is sparse, and its MLPs are fused."""
        planned = plan_slices(self.selection)
        with fused(model, self.found), without_data():
            shadow = copy_without_data(model)
            inject(shadow, planned)
            limit_checkpointing(shadow, planned)
            kept = [tensor for one in planned for tensor in (one.original, one.index)]
            yield Prepared(shadow, [self._trained(one) for one in planned], kept)

    def _trained(self, one: TrainableSlice) -> Trained:
        # A weight in float32 is its own master.
        values = FLOAT32 if self.master_weights and one.original.dtype != torch.float32 else 0
        return Trained(one.path, one.values.numel(), values, one.original.element_size(), FLOAT32, 2 * FLOAT32)


@dataclass(frozen=True)
class AllWeights:
    """Every weight, by torch's AdamW, which keeps gradients and moments in the precision of the weights.

    Attributes:
        autocast: the precision of the products, with float32 weights, as accelerate's mixed precision has it; None for
            that of the weights throughout.
        gathered: whether FSDP2 gathers the weights in that precision, so that autocast copies none; gradients then
            have it too until they are cut into parts.
    """

    autocast: torch.dtype | None = None
    gathered: bool = False
    copies_original: bool = True

    @property
    def name(self) -> str:
        """Says in which precision the weights are."""
        return "all weights" if self.autocast is None else "all, float32"

    def weight_bytes(self, parameter: Tensor) -> int:
        """Those of the parameter, or of one in float32."""
        return parameter.nbytes if self.autocast is None else FLOAT32 * parameter.numel()

    @contextmanager
    def prepare(self, model: nn.Module) -> Iterator[Prepared]:
        """All parameters train."""
        whole = model if self.autocast is None or self.gathered else copy.deepcopy(model).float()
        with without_data():
            shadow: Any = copy_without_data(whole)
            if self.autocast is not None:
                shadow.forward = _Mixed(shadow.forward, self.autocast)
            shadow.requires_grad_(True)
            trained = []
            for path, parameter in shadow.named_parameters():
                kept = self.weight_bytes(parameter) // max(1, parameter.numel())
                trained.append(Trained(path, parameter.numel(), 0, 0, kept, 2 * kept))
            yield Prepared(shadow, trained)


class _Mixed:
    """A forward under autocast, whose logits are widened, as accelerate wraps it."""

    def __init__(self, forward: Any, dtype: torch.dtype) -> None:
        self.forward, self.dtype = forward, dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", self.dtype):
            output = self.forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output


class Adapter:
    """A low-rank adapter of a linear layer, in float32, computed as peft does (Hu et al. 2021, arXiv 2106.09685).

    A forward hook of the layer.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        self.down = nn.Parameter(torch.empty(rank, inputs, device="cpu"))
        self.up = nn.Parameter(torch.empty(outputs, rank, device="cpu"))
        self.active = True

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Adds what the adapter gives."""
        if not self.active:
            return None
        change = functional.linear(functional.linear(args[0].float(), self.down), self.up)
        return (output + change * 2.0).to(output.dtype)


@dataclass(frozen=True)
class LowRank:
    """LoRA on all linear layers but the head, as peft's ``target_modules="all-linear"``; not on stacked experts.

    Attributes:
        rank: of each adapter.
    """

    rank: int = 16
    copies_original: bool = False

    @property
    def name(self) -> str:
        """With the rank."""
        return f"LoRA, r={self.rank}"

    def weight_bytes(self, parameter: Tensor) -> int:
        """Those of the parameter."""
        return parameter.nbytes

    @contextmanager
    def prepare(self, model: nn.Module) -> Iterator[Prepared]:
        """Every linear layer has an adapter."""
        with without_data():
            shadow: Any = copy_without_data(model)
            head = shadow.get_output_embeddings()
            trained: list[Trained] = []
            adapters: list[Adapter] = []
            for path, module in list(shadow.named_modules()):
                projection = projection_of(module, path)
                if projection is None or module is head or isinstance(module, nn.Embedding):
                    continue
                adapter = Adapter(projection.inputs, projection.outputs, self.rank)
                module.register_forward_hook(adapter)
                adapters.append(adapter)
                numbers = self.rank * (projection.inputs + projection.outputs)
                trained.append(Trained(path, numbers, FLOAT32, 0, FLOAT32, 2 * FLOAT32))
            kept: Sequence[Tensor] = [part for adapter in adapters for part in (adapter.down, adapter.up)]
            yield Prepared(shadow, trained, list(kept), adapters)
