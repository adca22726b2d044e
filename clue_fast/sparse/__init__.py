"""Sparse training: only the selected weights get gradients, optimizer state and updates.

``sparsify`` prepares a model, ``SparseAdamW`` and ``SparseSGD`` update it, and ``snapshot``, ``changed_inside`` and
``changed_outside`` prove that nothing else has changed.
"""

from clue_fast.deprecated import renamed_names
from clue_fast.sparse.changes import changed_inside, changed_outside, owned_weights, snapshot
from clue_fast.sparse.layer_rates import LayerRate, LinearLayerRate
from clue_fast.sparse.optimizer import SparseAdamW, SparseSGD
from clue_fast.sparse.sharding import fully_shard
from clue_fast.sparse.slices import TrainableSlice
from clue_fast.sparse.sparse import Sparse, sparsify

__all__ = [
    "LayerRate",
    "LinearLayerRate",
    "Sparse",
    "SparseAdamW",
    "SparseSGD",
    "TrainableSlice",
    "changed_inside",
    "changed_outside",
    "fully_shard",
    "owned_weights",
    "snapshot",
    "sparsify",
]

__getattr__ = renamed_names(__name__, TrainedPart="TrainableSlice")
