"""clue_fast: finds the neurons where forgetting conflicts with keeping, and unlearns by training only those.

Importing it loads torch alone; transformers, datasets and triton are loaded by what uses them.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from clue_fast.deprecated import keep_old_modules
from clue_fast.version import __version__

_EXPORTS = {
    "ClueFastError": "errors",
    "ConflictCallback": "trainer.callback",
    "Patched": "criteria",
    "Scores": "selection",
    "Selection": "selection",
    "Site": "sites.site",
    "SparseAdamW": "sparse.optimizer",
    "SparseSGD": "sparse.optimizer",
    "Statistics": "statistics",
    "UnlearnTrainer": "trainer.trainer",
    "attach": "trainer.attachment",
    "categorize": "selection",
    "estimate_memory": "trainer.memory",
    "evaluate": "evaluation.measurement",
    "find_sites": "sites.find",
    "load_records": "data.records",
    "localize": "localization",
    "patch": "criteria",
    "plan": "planning",
    "score": "criteria.registry",
    "select": "selection",
    "sparsify": "sparse.sparse",
    "unlearn": "unlearning",
    "unpatch": "criteria",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:  # what __getattr__ finds, for editors and type checkers
    from clue_fast.criteria.registry import score
    from clue_fast.data.records import load_records
    from clue_fast.errors import ClueFastError
    from clue_fast.evaluation.measurement import evaluate
    from clue_fast.localization import localize
    from clue_fast.planning import plan
    from clue_fast.recording import Patched, patch, unpatch
    from clue_fast.selection import Scores, Selection, categorize, select
    from clue_fast.sites.find import find_sites
    from clue_fast.sites.site import Site
    from clue_fast.sparse.optimizer import SparseAdamW, SparseSGD
    from clue_fast.sparse.sparse import sparsify
    from clue_fast.statistics import Statistics
    from clue_fast.trainer.attachment import attach
    from clue_fast.trainer.callback import ConflictCallback
    from clue_fast.trainer.memory import estimate_memory
    from clue_fast.trainer.trainer import UnlearnTrainer
    from clue_fast.unlearning import unlearn


def lazily(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a package that imports what has a name as soon as somebody asks for it.

    Args:
        package: its name.
        places: the module of each name, below the package.
    """

    def find(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return find


__getattr__ = lazily(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted(__all__)


keep_old_modules()
