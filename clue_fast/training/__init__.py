"""Sparse training: only the selected weights get gradients, optimizer state and updates.

``sparsify`` prepares a model, ``SparseAdamW`` updates it, the ``objectives`` say what a step should reach,
``UnlearnTrainer`` runs it all as a ``transformers.Trainer``, and ``audit`` proves that nothing else has
changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clue_fast.training.adamw import SparseAdamW
from clue_fast.training.audit import changed_inside, changed_outside, snapshot
from clue_fast.training.layer_rates import LayerRate, LinearLayerRate
from clue_fast.training.memory import MemoryEstimate, estimate_memory
from clue_fast.training.objectives import (
    DPO,
    KL,
    NPO,
    OBJECTIVES,
    RMU,
    UNDIAL,
    WGA,
    GradientAscent,
    GradientDifference,
    Objective,
    Refusal,
    SimNPO,
    get_objective,
)
from clue_fast.training.parts import TrainedPart
from clue_fast.training.sgd import SparseSGD
from clue_fast.training.shrinking import shrink
from clue_fast.training.sparse import Sparse, sparsify
from clue_fast.training.stages import Stage

if TYPE_CHECKING:
    from clue_fast.training.attaching import attach
    from clue_fast.training.trainer import UnlearnTrainer

__all__ = [
    "DPO",
    "KL",
    "NPO",
    "OBJECTIVES",
    "RMU",
    "UNDIAL",
    "WGA",
    "GradientAscent",
    "GradientDifference",
    "LayerRate",
    "LinearLayerRate",
    "MemoryEstimate",
    "Objective",
    "Refusal",
    "SimNPO",
    "Sparse",
    "SparseAdamW",
    "SparseSGD",
    "Stage",
    "TrainedPart",
    "UnlearnTrainer",
    "attach",
    "changed_inside",
    "changed_outside",
    "estimate_memory",
    "get_objective",
    "shrink",
    "snapshot",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    # These need transformers, which takes seconds to import.
    if name == "UnlearnTrainer":
        from clue_fast.training.trainer import UnlearnTrainer

        return UnlearnTrainer
    if name == "attach":
        from clue_fast.training.attaching import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
