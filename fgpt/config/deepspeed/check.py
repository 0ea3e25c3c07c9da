"""A DeepSpeed JSON against its keys: unknown keys, types, ranges. The rules check its meaning.

A likely misspelling is an error, and so is an unknown key where DeepSpeed raises on it. Where
DeepSpeed ignores unknown keys, one that resembles no known key is dropped with a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fgpt.config.deepspeed.keys import FOREIGN, IGNORES_UNKNOWN, SYNONYMS, TOP
from fgpt.config.deepspeed.settings import Tree, keys_of, value_at
from fgpt.errors import ConfigIssue, Edit
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
    if keys is None:  # they depend on a type that is not valid; an edit may make it valid
        checked.invalid.add(path)
        return dict(section)
    clean = {}
    for name, value in section.items():
        inner = f"{path}.{name}" if path else name
        if name not in keys:
            checked.issues.append(_unknown(file, path, name, keys, tree))
            # a default must not stand in for the key that was meant
            meant = nearest(name, keys)
            if meant and meant not in section:
                checked.invalid.add(f"{path}.{meant}" if path else meant)
            continue
        complaint = _complaint(inner, keys[name], value) if keys[name].is_checked else None
        if complaint:
            where, what = f"{file}: {inner}", f"{shown(value)} is wrong"
            edit = Edit(f"deepspeed.{inner}", _valid_value(inner, keys[name], value))
            checked.issues.append(ConfigIssue(where, what, complaint, edits=(edit,)))
            checked.invalid.add(inner)
        elif isinstance(value, dict) and keys[name].is_checked:
            clean[name] = _check_section(value, inner, tree, file, checked)
        else:
            clean[name] = value
    return clean


def _complaint(path: str, key: Key, value: Any) -> str | None:
    if path == "optimizer.type" and isinstance(value, str) and value.lower() not in OPTIMIZERS:
        return f"must be one of {', '.join(_USABLE)}{did_you_mean(value, _USABLE)}"
    return key.complaint(value)


_USABLE = [optimizer.name for optimizer in OPTIMIZERS.values() if not optimizer.refused]


def _valid_value(path: str, key: Key, value: Any) -> Any:
    """The valid value that `value` most likely means; None: none, so that the key is removed."""
    if path == "optimizer.type":
        return (nearest(value, _USABLE) if isinstance(value, str) else None) or "AdamW"
    if not isinstance(value, str):
        return None
    try:
        number = json.loads(value)
    except ValueError:
        number = None
    if number is not None and key.complaint(number) is None:
        return number
    return nearest(value, key.words)


def _unknown(file: str, path: str, name: str, keys: Mapping[str, Key], tree: Tree) -> ConfigIssue:
    where, what = f"{file}: {path}" if path else file, f"unknown key {name!r}"
    inner = f"{path}.{name}" if path else name
    drop = Edit(f"deepspeed.{inner}")
    if "." in name:  # no dotted path of an edit reaches it; it is dropped with this error
        return ConfigIssue(where, what, "write sections as nested objects { ... }")
    if name in FOREIGN and not path:
        return ConfigIssue(where, what, f"dropped: {FOREIGN[name]}", "warning", (drop,))
    sections = [section for section in _sections_with(name) if section != path]
    owners = [kind for kind, params in SCHEDULERS.items() if name in params]
    if path == "scheduler.params" and owners:
        what += f" of {value_at(tree, 'scheduler.type')}"
        fix = f"delete it; only {', '.join(owners)} take it"
        if value_at(tree, "scheduler.type") == "WarmupCosineLR" and name.startswith("warmup_m"):
            fix += "; the peak is optimizer.params.lr, the start warmup_min_ratio of it"
        return ConfigIssue(where, what, fix, edits=(drop,))
    if sections:
        fix = f"{name!r} belongs in {' or '.join(s or 'the top level' for s in sections)}"
        return ConfigIssue(where, what, fix, edits=_move(inner, _joined(sections[0], name), tree))
    own = SYNONYMS.get(name, "")
    if not path and " or " in own:
        return ConfigIssue(where, what, f"write {own}", edits=(drop,))
    if own and (not path or own.rpartition(".")[0] == path) and own != inner:
        return ConfigIssue(where, what, f"write it as {own!r}", edits=_move(inner, own, tree))
    guess = nearest(name, keys)
    if guess:
        fix = f"did you mean {guess!r}?"
        return ConfigIssue(where, what, fix, edits=_move(inner, _joined(path, guess), tree))
    if path in IGNORES_UNKNOWN and (elsewhere := _nearest_anywhere(name)):
        fix = f"did you mean {elsewhere!r}?"
        return ConfigIssue(where, what, fix, edits=_move(inner, elsewhere, tree))
    if path in IGNORES_UNKNOWN:
        return ConfigIssue(where, what, "dropped: DeepSpeed ignores it", "warning", (drop,))
    fix = "delete it; known here: " + ", ".join(k for k, key in keys.items() if key.is_checked)
    return ConfigIssue(where, what, fix, edits=(drop,))


def _nearest_anywhere(name: str) -> str:
    """The dotted key of any section that `name` most likely misspells; empty: none."""
    paths = {
        inner: f"{outer}.{inner}"
        for outer, key in TOP.items()
        for inner, inner_key in (key.keys or {}).items()
        if not inner_key.unread and inner not in ("enabled", "type", "params", "dtype")
    }
    guess = nearest(name, paths)
    return paths[guess] if guess else ""


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _move(old: str, new: str, tree: Tree) -> tuple[Edit, ...]:
    """Edits that write the value of `old` at `new`, where that is not written yet."""
    removal = Edit(f"deepspeed.{old}")
    if value_at(tree, new) is not None:
        return (removal,)
    return removal, Edit(f"deepspeed.{new}", value_at(tree, old))


def _sections_with(name: str) -> list[str]:
    """The sections that have a key of this name."""
    if name in ("enabled", "type", "params", "dtype", "device"):
        return []

    def below(keys: Mapping[str, Key], path: str) -> Iterator[str]:
        for inner, key in keys.items():
            if inner == name and not key.unread:
                yield path
            if key.keys:
                yield from below(key.keys, f"{path}.{inner}" if path else inner)

    sections = list(below(TOP, ""))
    if any(name in optimizer.params for optimizer in OPTIMIZERS.values()):
        sections.append("optimizer.params")
    if any(name in keys for keys in SCHEDULERS.values()):
        sections.append("scheduler.params")
    return sections
