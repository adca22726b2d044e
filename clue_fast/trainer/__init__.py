"""``UnlearnTrainer``, a ``transformers.Trainer`` that trains selected units on an objective, and what belongs to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clue_fast import lazily

if TYPE_CHECKING:
    from clue_fast.trainer.attachment import attach
    from clue_fast.trainer.callback import ConflictCallback
    from clue_fast.trainer.memory import MemoryEstimate, estimate_memory
    from clue_fast.trainer.stages import Stage
    from clue_fast.trainer.trainer import UnlearnTrainer
    from clue_fast.trainer.training import train_selected
    from clue_fast.trainer.update_scale import scale_update

__all__ = [
    "ConflictCallback",
    "MemoryEstimate",
    "Stage",
    "UnlearnTrainer",
    "attach",
    "estimate_memory",
    "scale_update",
    "train_selected",
]

# Some of these need transformers, which takes seconds to import.
__getattr__ = lazily(
    __name__,
    {
        "ConflictCallback": "callback",
        "MemoryEstimate": "memory",
        "Stage": "stages",
        "UnlearnTrainer": "trainer",
        "attach": "attachment",
        "estimate_memory": "memory",
        "scale_update": "update_scale",
        "train_selected": "training",
    },
)
