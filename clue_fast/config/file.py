"""Configuration files: the settings of a run in YAML or JSON, by the names of their fields in ``config``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass, field, fields
from typing import Any

from clue_fast.config import CircuitConfig
from clue_fast.config.schema import ByKind, is_number, name_list
from clue_fast.errors import ClueFastError, SettingError, UnknownNameError


@dataclass(frozen=True)
class Settings:
    """Values by the name of their setting, of a configuration file or of flags. Those of circuits are ``circuit.NAME``.

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
        known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
        with self.naming_lines():
            own = {name: value for name, value in self.values.items() if name in known}
            if "circuit" in known and (circuit := self.below("circuit")):
                own["circuit"] = CircuitConfig(**circuit)
            return kind(**own)

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
        if one.name == "circuit":
            found |= {f"circuit.{own.name}": own for own in fields(CircuitConfig)}
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
    for name, node, line in _entries(root, loader, path):
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


def _entries(root: Any, loader: Any, path: str) -> Iterable[tuple[str, Any, int]]:
    """Name, node and line of each setting of a file; those of circuits may stand below ``circuit``."""
    if root is None:
        return
    if root.id != "mapping":
        raise SettingError(f"{path}, line {root.start_mark.line + 1}: expected the names of settings and their values")
    for key, node in root.value:
        name = str(key.value).replace("-", "_")
        if name == "circuit" and node.id == "mapping":
            for own, value, line in _entries(node, loader, path):
                yield f"circuit.{own}", value, line
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
