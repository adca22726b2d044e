"""clue_fast: finds the neurons where forgetting conflicts with keeping, and unlearns by training only those.

Importing it loads torch alone; transformers, datasets and triton are loaded by what uses them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "ClueFastError": "errors",
    "ConflictCallback": "localization.live",
    "Patched": "patching",
    "Scores": "selection",
    "Selection": "selection",
    "Site": "sites",
    "SparseAdamW": "training.adamw",
    "SparseSGD": "training.sgd",
    "Statistics": "statistics",
    "UnlearnTrainer": "training.trainer",
    "attach": "training.attaching",
    "categorize": "selection",
    "estimate_memory": "training.memory",
    "evaluate": "evaluation",
    "find_sites": "sites",
    "load_records": "data",
    "localize": "localization",
    "patch": "patching",
    "score": "localization",
    "select": "selection",
    "sparsify": "training.sparse",
    "unlearn": "workflow",
    "unpatch": "patching",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:  # what __getattr__ finds, for editors and type checkers
    from clue_fast.data import load_records
    from clue_fast.errors import ClueFastError
    from clue_fast.evaluation import evaluate
    from clue_fast.localization import localize, score
    from clue_fast.localization.live import ConflictCallback
    from clue_fast.patching import Patched, patch, unpatch
    from clue_fast.selection import Scores, Selection, categorize, select
    from clue_fast.sites import Site, find_sites
    from clue_fast.statistics import Statistics
    from clue_fast.training.adamw import SparseAdamW
    from clue_fast.training.attaching import attach
    from clue_fast.training.memory import estimate_memory
    from clue_fast.training.sgd import SparseSGD
    from clue_fast.training.sparse import sparsify
    from clue_fast.training.trainer import UnlearnTrainer
    from clue_fast.workflow import unlearn


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
