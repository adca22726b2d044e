"""Old names, which work for one release: each warns once and says the new one."""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeAlias, TypeVar, cast

from clue_fast.errors import UnknownNameError

F = TypeVar("F", bound=Callable[..., Any])

MODULES: dict[str, tuple[str, ...]] = {
    "config.file": ("config.schema",),
    "data.labels": ("data.collator",),
    "doctor": ("env",),
    "labels": ("data.collator",),
    "localization": ("criteria", "criteria.circuit", "config"),
    "localization.circuit": ("criteria.circuit", "config"),
    "localization.criteria": ("criteria", "criteria.registry", "criteria.passes"),
    "localization.live": ("trainer",),
    "localization.plots": ("reporting",),
    "objectives.registry": ("objectives.base",),
    "ops.selected_update": ("ops.sparse_optimizer",),
    "ops.sparse_adamw": ("ops.sparse_optimizer",),
    "ops.sparse_sgd": ("ops.sparse_optimizer",),
    "ops.unit_statistics": ("ops.expert_statistics", "ops.unit_attribution"),
    "patching": ("recording", "criteria"),
    "people": ("demo.people",),
    "pretraining": ("demo.pretraining",),
    "report": ("reporting",),
    "sites.model": ("internals",),
    "sparse.audit": ("sparse",),
    "training": ("sparse", "objectives", "trainer"),
    "training.adamw": ("sparse",),
    "training.attaching": ("trainer",),
    "training.audit": ("sparse",),
    "training.layer_rates": ("sparse",),
    "training.memory": ("trainer",),
    "training.objectives": ("objectives",),
    "training.sgd": ("sparse",),
    "training.shrinking": ("trainer.update_scale",),
    "training.sparse": ("sparse",),
    "training.stages": ("trainer.stages",),
    "training.trainer": ("trainer",),
    "workflow": ("unlearning", "evaluation", "data", "config", "trainer.checkpoints"),
}
"""Where the names of a module of the release before are now, all below ``clue_fast``."""

NAMES = {"CircuitSettings": "CircuitConfig", "Recipe": "TrainConfig", "shrink": "scale_update"}
"""What is called otherwise now, by its name in the release before."""


def warn(what: str, stacklevel: int) -> None:
    """Warns of an old name; the stack is counted from the function that calls this one."""
    warnings.warn(f"{what}; the old name goes with the next release", FutureWarning, stacklevel=stacklevel + 1)


class _OldModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return moved(self.__name__, name)


def moved(module: str, name: str) -> Any:
    """Returns what a module held under a name in the release before, and warns with its place of today.

    Raises:
        AttributeError: it held nothing of that name.
    """
    now = NAMES.get(name, name)
    places = () if name.startswith("__") else MODULES[module.removeprefix("clue_fast.")]
    for new in [importlib.import_module(f"clue_fast.{place}") for place in places]:
        if hasattr(new, now):
            warn(f"{module}.{name} is {new.__name__}.{now} now", stacklevel=3)
            return getattr(new, now)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


def keep_old_modules() -> None:
    """Makes the modules of the release before importable, but ``localization``, which still bears that name."""
    for name in MODULES.keys() - {"localization"}:
        sys.modules.setdefault(f"clue_fast.{name}", _OldModule(f"clue_fast.{name}", __doc__))


Renamed: TypeAlias = "str | Callable[[Any], Mapping[str, Any]]"
"""The new name of an argument, or what makes the new arguments of its value."""


def renamed_arguments(**renamed: Renamed) -> Callable[[F], F]:
    """Lets a function or class take keyword arguments by their old names, each with a warning that says the new one.

    Args:
        renamed: the new name, or a function from the old value to the new arguments, by the old name.

    Raises:
        TypeError: in the call, if an argument is given by both names.
    """

    def decorate(function: F) -> F:
        if isinstance(function, type):
            setattr(function, "__init__", decorate(function.__init__))  # type: ignore[misc]  # noqa: B010
            return function

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:  # operators are called so often that a list of the old names would be felt
                if name in renamed:
                    break
            else:
                return function(*args, **kwargs)
            for old in [name for name in kwargs if name in renamed]:
                kwargs.update(_renamed(function.__qualname__, old, renamed[old], kwargs))
            return function(*args, **kwargs)

        return cast("F", called)

    return decorate


def _renamed(function: str, old: str, new: Renamed, kwargs: dict[str, Any]) -> Mapping[str, Any]:
    value = kwargs.pop(old)
    given = {new: value} if isinstance(new, str) else new(value)
    if both := given.keys() & kwargs.keys():
        raise TypeError(
            f"{function.removesuffix('.__init__')} got {old} and {', '.join(sorted(both))}; leave out {old}"
        )
    written = ", ".join(given if isinstance(new, str) else (f"{name}={entry!r}" for name, entry in given.items()))
    warn(f"the argument {old} of {function.removesuffix('.__init__')} is {written} now", stacklevel=3)
    return given


class RenamedAttribute:
    """An attribute or method by its old name: ``old = RenamedAttribute("new")`` in the body of the class."""

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        warn(f"{owner.__name__}.{self.old} is {self.new} now", stacklevel=2)
        return getattr(instance, self.new)


def rename_members(cls: type, **renamed: str) -> None:
    """Gives a class that defines a method or attribute by its old name the new one too, and says so.

    Args:
        cls: a subclass of a class whose members were renamed.
        renamed: the new name by the old one.
    """
    for old, new in renamed.items():
        if old in vars(cls) and new not in vars(cls):
            warn(f"{cls.__name__}.{old} is to be called {new} now", stacklevel=3)
            setattr(cls, new, vars(cls)[old])


def renamed_names(module: str, **renamed: str) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a module that finds what it holds by old names too, and says the new ones.

    Args:
        module: its name.
        renamed: the new name by the old one.
    """

    def find(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name} is {module}.{renamed[name]} now", stacklevel=2)
        return getattr(sys.modules[module], renamed[name])

    return find


MASTERS = ("fp32", "stochastic")


def precision(master: str) -> dict[str, bool]:
    """Returns ``master_weights`` and ``stochastic_rounding`` for what ``master`` said of both.

    Raises:
        UnknownNameError: it was neither "fp32" nor "stochastic".
    """
    if master not in MASTERS:
        raise UnknownNameError("master", master, MASTERS)
    return {"master_weights": master == "fp32", "stochastic_rounding": master == "stochastic"}
