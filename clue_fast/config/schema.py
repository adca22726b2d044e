"""What a setting is, and how the settings of a run are read from a configuration file.

First the fields of a configuration: default, help, the names that a value can have, how it is read and checked. Then
``Settings``, their values by name as a YAML or JSON file or the flags of the command have them.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any

from clue_fast.errors import ClueFastError, SettingError, UnknownNameError


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | Callable[[], Sequence[str]] = (),
    read: Callable[[str], Any] = str,
    check: Callable[[str, Any], None] | None = None,
    metavar: str | None = None,
    part: type | None = None,
) -> Any:
    """A field of a configuration.

    Args:
        default: its value unless it is given.
        help: for the command, without the default and the choices.
        choices: the names it can have, or what looks them up.
        read: makes its value of text; ValueError for what it cannot read.
        check: called with its name and value, unless that is None; raises a ClueFastError.
        metavar: what the help calls its value.
        part: the configuration that its value is, whose fields are settings by ``NAME.FIELD``.
    """
    metadata = {"help": help, "choices": choices, "read": read, "check": check, "metavar": metavar, "part": part}
    return field(default=default, metadata=metadata)


def same_as(kind: Any, name: str) -> Any:
    """A field that is one of another configuration: its default, its help, its choices and its check."""
    (one,) = (one for one in fields(kind) if one.name == name)
    return field(default=one.default, metadata=one.metadata)


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


def not_negative(name: str, value: Any) -> None:
    """Raises SettingError unless a value is a finite number from 0 on."""
    if not (is_number(value) and 0.0 <= value < math.inf):
        raise SettingError(f"{name} {value} is not a number from 0 on")


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


def part_of_depth(name: str, value: Any) -> None:
    """Raises SettingError unless a value is None or begin and end of a part of the layers, as shares of the depth."""
    if value is None:
        return
    shares = tuple(value) if isinstance(value, list | tuple) else ()
    if not (len(shares) == 2 and all(map(is_number, shares)) and 0.0 <= shares[0] < shares[1] <= 1.0):
        raise SettingError(f"{name} {value} is no part of the depth; give two shares, such as (0.5, 1.0)")


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


def two_shares(text: str) -> tuple[float, float]:
    """Reads two numbers with a colon between them, such as ``0.667:1``."""
    begin, end = text.split(":")
    return float(begin), float(end)


def share_or_none(text: str) -> float | None:
    """Reads a share, or ``none``."""
    return None if text == "none" else float(text)


def check_choices(config: Any, *only: str) -> None:
    """Raises UnknownNameError for the first field that has none of its choices; None is always one."""
    for one in fields(config):
        value, choices = getattr(config, one.name), choices_of(one) if not only or one.name in only else ()
        if choices and value is not None and value not in choices:
            raise UnknownNameError(one.name, value, choices)


@dataclass(frozen=True)
class Settings:
    """Values by the name of their setting, of a configuration file or of flags; those of a part are ``circuit.NAME``.

    Attributes:
        values: by name.
        lines: of those that stand in a configuration file, the line of each, from 1.
        path: of that file.
    """

    values: Mapping[str, Any]
    lines: Mapping[str, int] = field(default_factory=dict)
    path: str = ""

    def override(self, values: Mapping[str, Any]) -> Settings:
        """These settings with others in their place."""
        lines = {name: line for name, line in self.lines.items() if name not in values}
        return Settings({**self.values, **values}, lines, self.path)

    def make(self, kind: Callable[..., Any]) -> Any:
        """Makes a configuration of those of its settings that are here.

        Raises:
            ClueFastError: one is out of range, or two exclude each other; with its line in the file.
        """
        known = {one.name: one.metadata.get("part") for one in fields(kind)}  # type: ignore[arg-type]
        with self.naming_lines():
            own = {name: value for name, value in self.values.items() if name in known}
            parts = {name: (part, self.below(name)) for name, part in known.items() if part is not None}
            return kind(**own, **{name: part(**values) for name, (part, values) in parts.items() if values})

    @contextmanager
    def naming_lines(self) -> Iterator[None]:
        """Puts the lines of the settings that an error names in front of it."""
        try:
            yield
        except ClueFastError as error:
            words = set(re.findall(r"\w+", str(error)))
            lines = [line for name, line in self.lines.items() if words & set(name.split("."))]
            if lines:
                error.args = (f"{self.path}, line {' and '.join(map(str, sorted(lines)))}: {error}",)
            raise

    def below(self, name: str) -> dict[str, Any]:
        """The settings of a part, such as "circuit", without its name."""
        return {key.partition(".")[2]: value for key, value in self.values.items() if key.startswith(f"{name}.")}


def settings_of(*kinds: Any) -> dict[str, Field[Any]]:
    """The fields of configurations by their name in ``Settings``; not those that have no text."""
    found: dict[str, Field[Any]] = {}
    for one in (one for kind in kinds for one in fields(kind)):
        if part := one.metadata.get("part"):
            found |= {f"{one.name}.{own.name}": own for own in fields(part)}
        elif one.metadata["help"]:
            found.setdefault(one.name, one)
    return found


def read_settings(path: str | os.PathLike[str], *kinds: Any) -> Settings:
    """Reads a configuration file, YAML or JSON: the names of settings and their values.

    Args:
        path: of the file.
        kinds: the configurations whose settings may stand in it.

    Raises:
        SettingError: it cannot be read, or a value is of the wrong kind; with its line.
        UnknownNameError: it holds a setting that there is not; with its line and those there are.
    """
    import yaml

    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        if path.endswith(".json"):
            json.loads(text)
        # JSON is YAML but for tabs, which stand between its tokens alone.
        loader = yaml.SafeLoader(text.replace("\t", " ") if path.endswith(".json") else text)
        root = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"the configuration {path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise SettingError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = path if mark is None else f"{path}, line {mark.line + 1}"
        raise SettingError(f"{place}: not valid YAML ({getattr(error, 'problem', error)})") from error
    known = settings_of(*kinds)
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name, node, line in _entries(root, path, {name.partition(".")[0] for name in known if "." in name}):
        place = f"{path}, line {line}"
        if name in lines:
            raise SettingError(f"{place}: {name} stands there twice; leave one of them out")
        if name not in known:
            unknown = UnknownNameError("setting", name, known)
            unknown.args = (f"{place}: {unknown}",)
            raise unknown
        value = loader.construct_object(node, deep=True)
        lines[name] = line
        if value is not None:
            values[name] = _value(known[name], value, f"{place}: {name}")
    return Settings(values, lines, path)


def _entries(root: Any, path: str, parts: Collection[str]) -> Iterable[tuple[str, Any, int]]:
    """Name, node and line of each setting of a file; those of a part may stand below its name."""
    if root is None:
        return
    if root.id != "mapping":
        raise SettingError(f"{path}, line {root.start_mark.line + 1}: expected the names of settings and their values")
    for key, node in root.value:
        name = str(key.value).replace("-", "_")
        if name in parts and node.id == "mapping":
            yield from ((f"{name}.{own}", value, line) for own, value, line in _entries(node, path, ()))
        else:
            yield name, node, key.start_mark.line + 1


def _value(setting: Field[Any], value: Any, place: str) -> Any:
    """The value of a setting as its configuration has it, from one of YAML."""
    read, text = setting.metadata["read"], isinstance(value, str)
    if isinstance(setting.default, bool) or isinstance(value, bool):
        if isinstance(setting.default, bool) and isinstance(value, bool):
            return value
        expected = "true or false" if isinstance(setting.default, bool) else "a value, not a switch"
    elif read is name_list and isinstance(value, list):
        return tuple(map(str, value))
    elif read is two_shares and isinstance(value, list):
        return tuple(value)
    elif isinstance(value, Mapping) and isinstance(read, ByKind):
        return {str(kind): own for kind, own in value.items()}
    elif text or (is_number(value) and read is not str):
        try:
            return read(value) if text else value
        except ValueError:
            expected = "a number"
    else:
        expected = "a name" if read is str else "a number"
    raise SettingError(f"{place} {value!r} should be {expected}")
