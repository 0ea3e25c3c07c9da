"""Strict JSON for DeepSpeed JSONs, run files, recipes and data cards.

DeepSpeed reads hjson, which accepts comments, trailing commas and unquoted keys; json.load accepts
NaN and keeps the last of two equal keys. This reader refuses all of these.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgpt.errors import ConfigError, ConfigIssue

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class _Pairs:
    """A JSON object as written, in which a repeated key is still visible."""

    items: tuple[tuple[str, Any], ...]


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises ConfigError with every issue."""
    value = parse(read_text(path), str(path))
    if not isinstance(value, dict):
        what = f"holds {_type_name(value)}, not an object"
        raise ConfigError([ConfigIssue(str(path), what, 'write { "key": value, ... }')])
    return value


def read_text(path: Path) -> str:
    """Return a file's text. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir() or path.is_fifo()):
            what = "is no regular file"
            raise ConfigError([ConfigIssue(str(path), what, "name a JSON file")])
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError([_unreadable(path, error)]) from None
    if data.startswith(_BOM):
        what, fix = "starts with a byte-order mark", "save it as UTF-8 without BOM"
        raise ConfigError([ConfigIssue(str(path), what, fix)])
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 (byte {error.start})"
        raise ConfigError([ConfigIssue(str(path), what, "save it as UTF-8")]) from None


def parse(text: str, where: str) -> Any:
    """Return the JSON value in `text`. Raises ConfigError, whose issues name `where`."""
    if not text.strip():
        raise ConfigError([ConfigIssue(where, "is empty", "write at least { }")])
    try:
        raw = json.loads(text, object_pairs_hook=lambda pairs: _Pairs(tuple(pairs)))
    except json.JSONDecodeError as error:
        place = f"{where}: line {error.lineno} column {error.colno}"
        raise ConfigError(
            [ConfigIssue(place, f"not JSON: {error.msg}", _hint(text, error))]
        ) from None
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError([ConfigIssue(where, f"not JSON: {what}", "write plain JSON")]) from None
    issues: list[ConfigIssue] = []
    if _depth(raw) > _DEEPEST:
        raise ConfigError([ConfigIssue(where, "nested too deeply", "write plain JSON")])
    value = _convert(raw, "", where, issues)
    if issues:
        raise ConfigError(issues)
    return value


_DEEPEST = 50
"""Levels of objects and lists: more than any configuration has, few enough to recurse."""


def _depth(raw: Any) -> int:
    """The number of levels of a parsed value, counted without recursion."""
    depth, level = 0, [raw]
    while level and depth <= _DEEPEST:
        inner = [list(v.items) if isinstance(v, _Pairs) else v for v in level]
        level = [
            item[1] if isinstance(item, tuple) else item
            for value in inner
            if isinstance(value, list)
            for item in value
        ]
        depth += 1
    return depth


def _convert(raw: Any, path: str, where: str, issues: list[ConfigIssue]) -> Any:
    """Replace _Pairs by dicts; report repeated keys, non-finite numbers and lone surrogates."""
    place = f"{where}: {path}" if path else where
    if isinstance(raw, _Pairs):
        keys = [key for key, _ in raw.items]
        for key in sorted({key for key in keys if keys.count(key) > 1}):
            what = f"{_join(path, key)!r} is written {keys.count(key)} times"
            issues.append(ConfigIssue(place, what, "keep one of them"))
        for key in keys:
            _convert(key, _join(path, key.encode("ascii", "replace").decode()), where, issues)
        return {key: _convert(value, _join(path, key), where, issues) for key, value in raw.items}
    if isinstance(raw, list):
        return [_convert(value, f"{path}[{i}]", where, issues) for i, value in enumerate(raw)]
    if isinstance(raw, float) and not math.isfinite(raw):
        issues.append(ConfigIssue(place, f"{raw} is not a finite number", "write a finite number"))
    if isinstance(raw, str) and not _encodable(raw):
        issues.append(
            ConfigIssue(place, f"{raw!a} contains a lone surrogate", "write complete characters")
        )
    return raw


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _type_name(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _unreadable(path: Path, error: OSError) -> ConfigIssue:
    if isinstance(error, FileNotFoundError):
        return ConfigIssue(
            str(path),
            "does not exist",
            "check the path, which is relative to the working directory",
        )
    if isinstance(error, IsADirectoryError):
        return ConfigIssue(str(path), "is a directory", "name the JSON file in it")
    reason = error.strerror or type(error).__name__
    return ConfigIssue(str(path), f"cannot be read: {reason}", "check the path and its permissions")


def _hint(text: str, error: json.JSONDecodeError) -> str:
    """Guess the mistake from the characters around the error."""
    rest, before = text[error.pos :].lstrip(), text[: error.pos].rstrip()
    if rest.startswith(("//", "/*", "#")):
        return "JSON has no comments: delete it"
    if before.endswith(",") and rest[:1] in ("}", "]"):
        return "delete the comma before the closing bracket"
    # Python 3.13 reports the position of the trailing comma
    if rest[:1] == "," and rest[1:].lstrip()[:1] in ("}", "]"):
        return "delete the comma before the closing bracket"
    if rest.startswith("'"):
        return 'use double quotes: "..."'
    if rest.startswith(("True", "False", "None")):
        return "write true, false or null"
    if not rest or error.msg.startswith("Unterminated"):
        return "the file may be truncated: it ends too early"
    if error.msg == "Extra data":
        return "delete what follows the closing bracket"
    return 'check the commas and the double quotes: { "key": value, ... }'
