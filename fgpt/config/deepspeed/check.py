"""A DeepSpeed JSON against the schema: unknown keys, types, ranges. Its sense is for the rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fgpt.config.deepspeed.schema import TOP
from fgpt.errors import ConfigIssue
from fgpt.optim.optimizers import OPTIMIZERS, SCHEDULERS, Build
from fgpt.utils.keys import Key, did_you_mean, nearest, shown

Tree = Mapping[str, Any]


@dataclass
class Checked:
    """The outcome of `check`."""

    tree: dict[str, Any] = field(default_factory=dict)
    """The JSON without its invalid keys."""
    invalid: set[str] = field(default_factory=set)
    """Dotted paths of the keys left out that the schema knows."""
    issues: list[ConfigIssue] = field(default_factory=list)


def check(tree: Tree, file: str) -> Checked:
    """Every unknown key and every value of the wrong type or range, at every level."""
    checked = Checked()
    checked.tree = _section(tree, "", tree, file, checked)
    return checked


def walk(tree: Tree) -> Iterator[tuple[str, Key, Any]]:
    """(dotted path, Key, value) of every known key written in `tree`, sections included."""

    def below(part: Tree, path: str) -> Iterator[tuple[str, Key, Any]]:
        keys = keys_of(path, tree) or {}
        for name, value in part.items():
            if name in keys:
                inner = f"{path}.{name}" if path else name
                yield inner, keys[name], value
                if isinstance(value, dict) and not keys[name].refused:
                    yield from below(value, inner)

    return below(tree, "")


def lookup(tree: Tree, path: str) -> tuple[Any, Key | None]:
    """The value written at a dotted path (None if absent) and its Key (None if unknown)."""
    value: Any = tree
    key: Key | None = None
    done = ""
    for name in path.split("."):
        key = (keys_of(done, tree) or {}).get(name)
        value = value.get(name) if isinstance(value, dict) else None
        done = f"{done}.{name}" if done else name
    return value, key


def keys_of(path: str, tree: Tree) -> Mapping[str, Key] | None:
    """The keys a section may hold; None if that cannot be known (no valid `type` beside it)."""
    if not path:
        return TOP
    if path == "optimizer.params":
        kind = _meant(_written(tree, "optimizer", "type"), OPTIMIZERS)
        optimizer = OPTIMIZERS.get(kind.lower())
        return optimizer.keys(adam_build(tree)) if optimizer and not optimizer.refused else None
    if path == "scheduler.params":
        return SCHEDULERS.get(_meant(_written(tree, "scheduler", "type"), SCHEDULERS))
    keys: Mapping[str, Key] | None = TOP
    for name in path.split("."):
        keys = keys[name].keys if keys and name in keys else None
    return keys


def adam_build(tree: Tree) -> Build:
    """Which Adam class DeepSpeed builds from this JSON (engine.get_optimizer_configuration)."""
    if _written(tree, "optimizer", "params", "torch_adam") is True:
        return "torch"
    offload = _written(tree, "zero_optimization", "offload_optimizer", "device")
    return "cpu" if offload in ("cpu", "nvme") else "fused"


def _meant(word: Any, known: Mapping[str, Any]) -> str:
    """The known word, or the one it was meant to be: parameters beside a misspelled type are
    checked too."""
    return (nearest(word, known) or word) if isinstance(word, str) else ""


def _written(tree: Any, *names: str) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _section(part: Tree, path: str, tree: Tree, file: str, checked: Checked) -> dict[str, Any]:
    keys = keys_of(path, tree)
    if keys is None:
        checked.invalid.add(path)
        return {}
    clean = {}
    for name, value in part.items():
        inner = f"{path}.{name}" if path else name
        if name not in keys:
            checked.issues.append(_unknown(file, path, name, keys))
            # What the misspelled key was meant to be is not what the default says.
            meant = nearest(name, keys)
            if meant and meant not in part:
                checked.invalid.add(f"{path}.{meant}" if path else meant)
            continue
        complaint = None if keys[name].refused else _complaint(inner, keys[name], value)
        if complaint:
            what = f"{shown(value)} is wrong"
            checked.issues.append(ConfigIssue(f"{file}: {inner}", what, complaint))
            checked.invalid.add(inner)
        elif isinstance(value, dict) and not keys[name].refused:
            clean[name] = _section(value, inner, tree, file, checked)
        else:
            clean[name] = value
    return clean


def _complaint(path: str, key: Key, value: Any) -> str | None:
    if path == "optimizer.type" and isinstance(value, str) and value.lower() not in OPTIMIZERS:
        usable = [o.name for o in OPTIMIZERS.values() if not o.refused]
        return f"must be one of {', '.join(usable)}{did_you_mean(value, usable)}"
    return key.complaint(value)


def _unknown(file: str, path: str, name: str, keys: Mapping[str, Key]) -> ConfigIssue:
    where = f"{file}: {path}" if path else file
    found = nearest(name, keys)
    homes = [home for home in _homes(name) if home != path]
    if homes:
        fix = f"{name!r} belongs in {' or '.join(home or 'the top level' for home in homes)}"
    elif found:
        fix = f"did you mean {found!r}?"
    else:
        fix = "delete it; known here: " + ", ".join(k for k, key in keys.items() if not key.refused)
    return ConfigIssue(where, f"unknown key {name!r}", fix)


def _homes(name: str) -> list[str]:
    """The sections that know this key."""

    def below(keys: Mapping[str, Key], path: str) -> Iterator[str]:
        for inner, key in keys.items():
            if inner == name and not key.refused:
                yield path
            if key.keys:
                yield from below(key.keys, f"{path}.{inner}" if path else inner)

    params = any(name in keys for keys in SCHEDULERS.values())
    optim = any(name in o.params for o in OPTIMIZERS.values())
    extra = ["optimizer.params"] * optim + ["scheduler.params"] * params
    return [*below(TOP, ""), *extra] if name not in ("enabled", "type", "params") else []
