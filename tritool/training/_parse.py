# SPDX-License-Identifier: Apache-2.0
"""From YAML or JSON to frozen dataclasses: every key known, every type right, or one clear line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union

__all__ = ["ConfigError", "build", "nearest", "plain", "read_yaml", "write_yaml"]

T = TypeVar("T")

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


class ConfigError(ValueError):
    """What is wrong with a configuration, in one line that starts with the setting's name."""


def build(cls: type[T], values: object, where: str) -> T:
    """Makes a dataclass of a mapping, nested ones and all.

    A class may have a class method `parse(values, where)` of its own, which is then used instead.
    Checks of the class itself, in `__post_init__`, raise a `ValueError` whose text starts with the
    field's name.

    Args:
        cls: A dataclass.
        values: What the file holds at this place.
        where: The place, such as `training.schedule`; empty for the whole file.

    Raises:
        ConfigError: A key is unknown or missing, or a value is impossible.
    """
    hook = getattr(cls, "parse", None)
    if hook is not None:
        return hook(values, where)  # type: ignore[no-any-return]
    return build_plain(cls, values, where)


def build_plain(cls: type[T], values: object, where: str) -> T:
    """The same without asking the class for its own way."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or 'the file'} must be a mapping of settings, {_got(values)}")
    assert dataclasses.is_dataclass(cls)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise ConfigError(f"{_join(where, str(key))} is unknown{nearest(str(key), fields)}")
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and name not in values:
            raise ConfigError(f"{_join(where, name)} is missing")
    arguments = {
        name: _value(hints[name], value, _join(where, name)) for name, value in values.items()
    }
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(_join(where, str(error))) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: what may have been meant, or what there is."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def plain(value: object) -> Any:
    """Dataclasses and tuples as the mappings and lists that YAML and JSON hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.init
        }
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def read_yaml(text: str) -> object:
    """Reads YAML of plain values, no key twice.

    Raises:
        ConfigError: It is no YAML; the message has the line.
        ImportError: PyYAML is not installed.
    """
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # type: ignore[misc,name-defined]
        """Of two equal keys YAML keeps the last, silently; here that is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            seen = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    line = key_node.start_mark.line + 1
                    raise ConfigError(f"line {line}: {key} is there twice")
                seen.add(key)
            made: dict[Hashable, Any] = super().construct_mapping(node, deep)
            return made

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{place}it is no YAML: {problem}") from None


def write_yaml(values: object) -> str:
    """YAML of mappings, lists and plain values, which `read_yaml` reads as they were.

    Raises:
        ImportError: PyYAML is not installed.
    """
    return str(_yaml().safe_dump(values, sort_keys=False, default_flow_style=None))


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            "configurations need PyYAML; type: pip install 'tritool[train]'"
        ) from None
    return yaml


# ---- Values ----


def _value(hint: Any, value: object, where: str) -> Any:
    """`value` as the type that the field asks for."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            if type(None) in arguments:
                return None
            raise ConfigError(f"{where} must have a value, got none")
        (inner,) = (each for each in arguments if each is not type(None))
        return _value(inner, value, where)
    if origin is Literal:
        # YAML reads a bare `no` as false.
        value = "no" if value is False and "no" in arguments else value
        if value not in arguments:
            one_of = ", ".join(map(str, arguments))
            near = nearest(value, arguments) if isinstance(value, str) else ""
            hint_text = near if "did you mean" in near else ""
            raise ConfigError(f"{where} must be one of {one_of}, {_got(value)}{hint_text}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build(hint, value, where)
    return _scalar(hint, value, where)


def _tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    any_length = len(arguments) == 2 and arguments[1] is Ellipsis
    if any_length and isinstance(value, int | float | str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} must be a list, {_got(value)}")
    if any_length:
        kinds: tuple[Any, ...] = (arguments[0],) * len(value)
    elif len(value) != len(arguments):
        raise ConfigError(f"{where} must be a list of {len(arguments)}, got {len(value)} values")
    else:
        kinds = arguments
    return tuple(
        _value(kind, item, f"{where}[{at}]")
        for at, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _scalar(kind: Any, value: object, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        number = _number(value)
        if number is not None:
            if not math.isfinite(number):
                raise ConfigError(f"{where} must be a finite number, {_got(value)}")
            return number
    # True is an int, but no number here.
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} must be {_NAMES.get(kind, kind)}, {_got(value)}")


def _number(value: object) -> float | None:
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, str):  # YAML 1.1 takes 1e-5, without a point, for a text
        try:
            return float(value)
        except ValueError:
            return None
    return None


def _got(value: object) -> str:
    text = repr(value)
    return f"got {text if len(text) <= 60 else text[:57] + '...'}"


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
