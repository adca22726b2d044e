"""Bytes and operations of a localization and a training, from a configuration alone and without weights.

The model is made on the meta device, a few of its layers are run on shapes as ``estimate_memory`` runs all
(``clue_fast.trainer.tracing``), and stand for the others.
"""

from clue_fast.planning.planned import Plan, Training, plan
from clue_fast.planning.shapes import SHAPES

__all__ = ["SHAPES", "Plan", "Training", "plan"]
