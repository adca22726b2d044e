"""What a field of a configuration is: its default, its help, the names it can have, and how it is read and checked."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from clue_fast.errors import SettingError, UnknownNameError


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    read: Callable[[str], Any] = str,
    check: Callable[[str, Any], None] | None = None,
    metavar: str | None = None,
) -> Any:
    """A field of a configuration.

    Args:
        default: its value unless it is given.
        help: for the command, without the default and the choices.
        choices: the names it can have, or what looks them up.
        read: makes its value of text; ValueError for what it cannot read.
        check: called with its name and value, unless that is None; raises a ClueFastError.
        metavar: what the help calls its value.
    """
    metadata = {"help": help, "choices": choices, "read": read, "check": check, "metavar": metavar}
    return field(default=default, metadata=metadata)


def registered(place: str) -> Callable[[], Sequence[str]]:
    """Looks up the names of a registry, such as ``criteria.CRITERIA``, when it is asked for them."""

    def names() -> Sequence[str]:
        module, _, name = place.rpartition(".")
        return tuple(getattr(importlib.import_module(f"clue_fast.{module}"), name))

    return names


def choices_of(setting: Field[Any]) -> Sequence[str]:
    """Returns the names that a field can have; none where it holds anything else."""
    choices = setting.metadata.get("choices", ())
    return tuple(choices() if callable(choices) else choices)


def is_number(value: Any) -> bool:
    """Whether a value is a number, and not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def positive(name: str, value: Any) -> None:
    """Raises SettingError unless a value is a finite number above 0."""
    if not (is_number(value) and 0.0 < value < math.inf):
        raise SettingError(f"{name} {value} is not a number above 0")


def positive_integer(name: str, value: Any) -> None:
    """Raises SettingError unless a value is a positive integer."""
    if not (is_number(value) and 1 <= value < math.inf and value == int(value)):
        raise SettingError(f"{name} {value} is not a positive integer")


def whole_number(name: str, value: Any) -> None:
    """Raises SettingError unless a value is a whole number from 0 on."""
    if not (is_number(value) and 0 <= value < math.inf and value == int(value)):
        raise SettingError(f"{name} {value} is not a whole number from 0 on")


def integer(name: str, value: Any) -> None:
    """Raises SettingError unless a value is a whole number."""
    if not (is_number(value) and math.isfinite(value) and value == int(value)):
        raise SettingError(f"{name} {value} is not a whole number")


def share(name: str, value: Any) -> None:
    """Raises SettingError unless a value is in (0, 1]."""
    if not (is_number(value) and 0.0 < value <= 1.0):
        raise SettingError(f"{name} {value} is not a share above 0 and up to 1")


def switch(name: str, value: Any) -> None:
    """Raises SettingError unless a value is True or False."""
    if not isinstance(value, bool):
        raise SettingError(f"{name} {value!r} is neither true nor false")


def every_one_of(kind: str, choices: Callable[[], Sequence[str]]) -> Callable[[str, Any], None]:
    """A check that raises UnknownNameError for a name that is none of the choices."""

    def check(_: str, values: Any) -> None:
        for value in [values] if isinstance(values, str) else values:
            if value not in choices():
                raise UnknownNameError(kind, value, choices())

    return check


def check_rule(layer_lr: str) -> float:
    """Returns the number of ``linear:NUMBER``. Raises SettingError for any other text."""
    kind, _, number = layer_lr.partition(":")
    try:
        if kind == "linear" and 0.0 <= float(number) < math.inf:
            return float(number)
    except ValueError:
        pass
    raise SettingError(f"layer_lr {layer_lr!r} is neither a number nor linear:NUMBER")


@dataclass(frozen=True)
class ByKind:
    """Reads a number, or one for each kind of unit: ``mlp=0.05,attention=0.1``."""

    read: Callable[[str], float]

    def __call__(self, text: str) -> float | dict[str, float]:
        """Raises ValueError for what is neither."""
        if "=" not in text:
            return self.read(text)
        pairs = (pair.partition("=") for pair in text.split(","))
        return {kind.strip(): self.read(value) for kind, _, value in pairs}


def name_list(text: str) -> tuple[str, ...]:
    """Reads names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def ratio(text: str) -> float | str:
    """Reads a number, or a rule by its name and number, such as ``linear:0.2``."""
    try:
        return float(text)
    except ValueError:
        return text


def share_or_none(text: str) -> float | None:
    """Reads a share, or ``none``."""
    return None if text == "none" else float(text)


def check_choices(config: Any, *only: str) -> None:
    """Raises UnknownNameError for the first field that has none of its choices; None is always one."""
    for one in fields(config):
        value, choices = getattr(config, one.name), choices_of(one) if not only or one.name in only else ()
        if choices and value is not None and value not in choices:
            raise UnknownNameError(one.name, value, choices)
