"""What `data.path` may say: one data set, or several with weights, DIR:0.7,DIR:0.3."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
LOWEST, HIGHEST = 1e-9, 1e9
"""Bounds of a weight."""


class Part(NamedTuple):
    """One data set of a blend."""

    path: str
    weight: Fraction
    """Of any sum with the others'."""


def blend_of(text: str) -> list[Part]:
    """The data sets in a text without issue, in its order."""
    return [Part(path, Fraction(weight or 1)) for path, weight in _split(text)]


def blend_issue(text: str) -> str:
    """What is wrong with the text, or nothing."""
    parts = list(_split(text))
    paths = [path for path, _ in parts]
    for path, weight in parts:
        if not path:
            return f"{text!r} has a part without a directory"
        if paths.count(path) > 1:
            return f"{path!r} stands there twice"
        if not weight and len(parts) > 1:
            return f"{path!r} has no weight"
        if weight and not LOWEST <= float(weight) <= HIGHEST:
            return f"weight {weight} of {path!r} is not within {LOWEST:g} and {HIGHEST:g}"
    return ""


def blend_as_text(value: list[Any]) -> str | None:
    """ "a:0.7,b:0.3" for [{"path": "a", "weight": 0.7}, ...]; None for anything else."""
    if not all(isinstance(part, dict) and part.keys() == {"path", "weight"} for part in value):
        return None
    if not all(type(part["weight"]) in (int, float) for part in value):
        return None
    return ",".join(f"{part['path']}:{part['weight']!r}" for part in value)


def _split(text: str) -> Iterator[tuple[str, str]]:
    """(path, weight or nothing) of each part."""
    for part in text.split(","):
        path, colon, weight = part.strip().rpartition(":")
        if colon and _NUMBER.fullmatch(weight.strip()):
            yield path.strip(), weight.strip()
        else:
            yield part.strip(), ""
