"""Old names, which work for one release: each warns once and says the new one."""

from __future__ import annotations

import importlib
import sys
import warnings
from types import ModuleType
from typing import Any

MODULES: dict[str, tuple[str, ...]] = {
    "doctor": ("env",),
    "labels": ("data",),
    "localization": ("criteria", "criteria.circuit"),
    "localization.circuit": ("criteria.circuit",),
    "localization.criteria": ("criteria", "criteria.registry"),
    "localization.live": ("trainer",),
    "localization.plots": ("reporting",),
    "patching": ("recording",),
    "people": ("demo.people",),
    "pretraining": ("demo.pretraining",),
    "report": ("reporting",),
    "training": ("sparse", "objectives", "trainer"),
    "training.adamw": ("sparse",),
    "training.attaching": ("trainer",),
    "training.audit": ("sparse",),
    "training.layer_rates": ("sparse",),
    "training.memory": ("trainer",),
    "training.objectives": ("objectives",),
    "training.sgd": ("sparse",),
    "training.sparse": ("sparse",),
    "training.stages": ("trainer.stages",),
    "training.trainer": ("trainer",),
    "workflow": ("unlearning", "data", "config"),
}
"""Where the names of a module of the release before are now, all below ``clue_fast``."""


class _OldModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return moved(self.__name__, name)


def moved(module: str, name: str) -> Any:
    """Returns what a module held under a name in the release before, and warns with its place of today.

    Raises:
        AttributeError: it held nothing of that name.
    """
    places = () if name.startswith("__") else MODULES[module.removeprefix("clue_fast.")]
    for place in places:
        new = importlib.import_module(f"clue_fast.{place}")
        if hasattr(new, name):
            warnings.warn(
                f"{module}.{name} is {new.__name__}.{name} now; the old name goes with the next release",
                FutureWarning,
                stacklevel=3,
            )
            return getattr(new, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def keep_old_modules() -> None:
    """Makes the modules of the release before importable, but ``localization``, which still bears that name."""
    for name in MODULES.keys() - {"localization"}:
        sys.modules.setdefault(f"clue_fast.{name}", _OldModule(f"clue_fast.{name}", __doc__))
