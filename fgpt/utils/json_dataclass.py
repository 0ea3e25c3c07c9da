"""Strict JSON -> frozen dataclass, for recipes and data cards.

One DataError reports every unknown key, missing key and wrong type of a file.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fgpt.errors import ConfigError, DataError
from fgpt.utils.keys import nearest
from fgpt.utils.strict_json import read_object

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises DataError with line and column of an error."""
    try:
        return read_object(path)
    except ConfigError as error:
        raise DataError("; ".join(map(str, error.issues))) from None


def from_json(cls: type[T], value: Any, where: str) -> T:
    """Build dataclass `cls` from parsed JSON. Raises DataError, which names `where` (a file)."""
    problems: list[str] = []
    built = _build(cls, value, "", problems)
    if problems:
        raise DataError(f"{where}: " + "; ".join(problems))
    return built


def _build(cls: Any, value: Any, at: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{at or 'the file'}: expected an object, found {_type_name(value)}")
        return None
    prefix = f"{at}." if at else ""
    hints = get_type_hints(cls)
    for key in value.keys() - hints.keys():
        problems.append(f'unknown key "{prefix}{key}"{_did_you_mean(key, hints)}')
    kwargs: dict[str, Any] = {}
    for field in fields(cls):
        if field.name in value:
            kwargs[field.name] = _convert(
                hints[field.name], value[field.name], prefix + field.name, problems
            )
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f'key "{prefix}{field.name}" is missing')
    return None if problems else cls(**kwargs)


def _convert(kind: Any, value: Any, at: str, problems: list[str]) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        is_list = isinstance(value, list)
        kind = next((k for k in kinds if (get_origin(k) is tuple) == is_list), kinds[0])
        return _convert(kind, value, at, problems)
    if is_dataclass(kind):
        return _build(kind, value, at, problems)
    if origin is Literal:
        if value not in args:
            problems.append(f'"{at}" is {value!r}; one of {", ".join(map(repr, args))} is expected')
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(
            _convert(args[0], item, f"{at}[{i}]", problems) for i, item in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        return {
            key: _convert(args[1], item, f"{at}.{key}", problems) for key, item in value.items()
        }
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        problems.append(f'"{at}" is {value!r}; expected {_type_name(kind)}')
    return value


def _did_you_mean(key: str, known: Iterable[str]) -> str:
    close = nearest(key, known)
    return f' (did you mean "{close}"?)' if close else f" (known: {', '.join(known)})"


def _type_name(value: Any) -> str:
    return getattr(value if isinstance(value, type) else type(value), "__name__", str(value))
