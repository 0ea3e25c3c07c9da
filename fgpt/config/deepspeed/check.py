"""A DeepSpeed JSON against its keys: unknown keys, types, ranges. The rules check its meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fgpt.config.deepspeed.keys import TOP
from fgpt.config.deepspeed.settings import Tree, keys_of
from fgpt.errors import ConfigIssue
from fgpt.optim.optimizers import OPTIMIZERS
from fgpt.optim.schedules import SCHEDULERS
from fgpt.utils.keys import Key, did_you_mean, nearest, shown


@dataclass
class CheckedJson:
    """The result of `check`."""

    tree: dict[str, Any] = field(default_factory=dict)
    """The JSON without unknown keys and invalid values."""
    invalid: set[str] = field(default_factory=set)
    """Dotted paths of the known keys that `tree` lacks for that; "" is the whole JSON."""
    issues: list[ConfigIssue] = field(default_factory=list)


def check(tree: Tree, file: str) -> CheckedJson:
    """Find every unknown key and every value of a wrong type or range, at every level."""
    checked = CheckedJson()
    checked.tree = _check_section(tree, "", tree, file, checked)
    return checked


def _check_section(
    section: Tree, path: str, tree: Tree, file: str, checked: CheckedJson
) -> dict[str, Any]:
    keys = keys_of(path, tree)
    if keys is None:
        checked.invalid.add(path)
        return {}
    clean = {}
    for name, value in section.items():
        inner = f"{path}.{name}" if path else name
        if name not in keys:
            checked.issues.append(_unknown(file, path, name, keys))
            # a default must not stand in for the key that was meant
            meant = nearest(name, keys)
            if meant and meant not in section:
                checked.invalid.add(f"{path}.{meant}" if path else meant)
            continue
        complaint = None if keys[name].refused else _complaint(inner, keys[name], value)
        if complaint:
            what = f"{shown(value)} is wrong"
            checked.issues.append(ConfigIssue(f"{file}: {inner}", what, complaint))
            checked.invalid.add(inner)
        elif isinstance(value, dict) and not keys[name].refused:
            clean[name] = _check_section(value, inner, tree, file, checked)
        else:
            clean[name] = value
    return clean


def _complaint(path: str, key: Key, value: Any) -> str | None:
    if path == "optimizer.type" and isinstance(value, str) and value.lower() not in OPTIMIZERS:
        usable = [o.name for o in OPTIMIZERS.values() if not o.refused]
        return f"must be one of {', '.join(usable)}{did_you_mean(value, usable)}"
    return key.complaint(value)


def _unknown(file: str, path: str, name: str, keys: Mapping[str, Key]) -> ConfigIssue:
    guess = nearest(name, keys)
    sections = [section for section in _sections_with(name) if section != path]
    if sections:
        fix = f"{name!r} belongs in {' or '.join(s or 'the top level' for s in sections)}"
    elif guess:
        fix = f"did you mean {guess!r}?"
    else:
        fix = "delete it; known here: " + ", ".join(k for k, key in keys.items() if not key.refused)
    return ConfigIssue(f"{file}: {path}" if path else file, f"unknown key {name!r}", fix)


def _sections_with(name: str) -> list[str]:
    """The sections that have a key of this name."""
    if name in ("enabled", "type", "params"):
        return []

    def below(keys: Mapping[str, Key], path: str) -> Iterator[str]:
        for inner, key in keys.items():
            if inner == name and not key.refused:
                yield path
            if key.keys:
                yield from below(key.keys, f"{path}.{inner}" if path else inner)

    sections = list(below(TOP, ""))
    if any(name in optimizer.params for optimizer in OPTIMIZERS.values()):
        sections.append("optimizer.params")
    if any(name in keys for keys in SCHEDULERS.values()):
        sections.append("scheduler.params")
    return sections
