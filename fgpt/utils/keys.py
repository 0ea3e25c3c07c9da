"""`Key`: the type, range and allowed words of one key of a DeepSpeed JSON or a run file."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["bool", "int", "count", "number", "string", "strings", "pair", "section"]
"""count: an integer that may be written as a float (5e8), as DeepSpeed's bucket sizes are;
pair: two numbers; strings: a list of strings; section: an object with keys."""

AUTO = "auto"

_KIND_NAMES: Mapping[Kind, str] = {
    "bool": "true or false",
    "int": "a whole number",
    "count": "a whole number",
    "number": "a number",
    "string": "a string",
    "strings": "a list of strings",
    "pair": "a list of two numbers",
    "section": "an object { ... }",
}


@dataclass(frozen=True)
class Key:
    """One known key. Bounds are inclusive unless `open_low` / `open_high`."""

    kind: Kind
    default: Any = None
    """The value of an absent key (DeepSpeed's default, in its JSON)."""
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    words: tuple[str, ...] = ()
    """The allowed strings; empty: any."""
    any_case: bool = False
    """Whether case does not matter in `words`."""
    auto: bool = False
    """Whether "auto" is allowed; `fgpt.config.derive.AUTOS` has its value."""
    null: bool = False
    """Whether null is allowed."""
    keys: Mapping[str, Key] | None = None
    """The keys of a section; None: they depend on a type beside them, or are not checked."""
    stages: tuple[int, ...] = ()
    """The ZeRO stages that read the key; empty: all."""
    device: str = ""
    """The offload device beside it that reads the key; empty: any."""
    refused: str = ""
    """Why FGPT refuses a key that DeepSpeed knows, unless it is off; empty: it does not."""
    only_default: str = ""
    """Why FGPT refuses every value but the default; empty: it does not."""
    instead: str = ""
    """The key to write instead of a refused one."""
    unread: str = ""
    """Why the key has no effect in FGPT, whatever its value, and is dropped; empty: it has."""
    renamed: str = ""
    """The dotted key that an old or internal name stands for; empty: the name is current."""

    @property
    def is_checked(self) -> bool:
        """Whether the key's value, and the keys of a section, must be valid."""
        return not (self.refused or self.unread or self.renamed)

    def complaint(self, value: Any) -> str | None:
        """Why `value` is invalid, or None. Does not check the keys of a section."""
        if value is None and self.null:
            return None
        if isinstance(value, str) and value == AUTO and self.kind != "string":
            return None if self.auto else f"cannot be 'auto': must be {self.expected()}"
        if not self._fits(value):
            return f"must be {self.expected()}"
        if isinstance(value, str) and "\0" in value:
            return "must not contain the character U+0000"
        if self.words and not self._is_word(value):
            return f"must be {self.expected()}{did_you_mean(value, self.words)}"
        numbers = value if self.kind == "pair" else [value]
        if self.kind in ("int", "count", "number", "pair") and not all(map(self._inside, numbers)):
            return f"must be {self.expected()}"
        return None

    def expected(self) -> str:
        """The allowed values, in words."""
        if self.words:
            name = "one of " + ", ".join(self.words)
        else:
            name = _KIND_NAMES[self.kind]
        if self.low is not None:
            name += f" > {self.low:g}" if self.open_low else f" >= {self.low:g}"
        if self.high is not None:
            sign = "<" if self.open_high else "<="
            name += f"{' and' if self.low is not None else ''} {sign} {self.high:g}"
        name += " or 'auto'" if self.auto else ""
        return name + (" or null" if self.null else "")

    def _fits(self, value: Any) -> bool:
        if self.kind == "strings":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        if self.kind == "pair":
            return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
        if self.kind == "count":
            return _is_number(value) and float(value).is_integer()
        if self.kind == "number":
            return _is_number(value)
        if self.kind == "int":
            return isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, {"bool": bool, "string": str, "section": dict}[self.kind])

    def _is_word(self, value: str) -> bool:
        if self.any_case:
            return value.lower() in {word.lower() for word in self.words}
        return value in self.words

    def _inside(self, value: float) -> bool:
        if self.low is not None and (value <= self.low if self.open_low else value < self.low):
            return False
        if self.high is not None:
            return value < self.high if self.open_high else value <= self.high
        return True


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


_PREFIX_LENGTH = 4
"""Characters of an abbreviation that still says which word it stands for."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely misspells or abbreviates, or None."""
    by_lower = {name.lower(): name for name in known}
    # 0.75: one wrong character of four; below it, guesses are mostly wrong (warmup -> amp)
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.75)
    if not matches and len(word) >= _PREFIX_LENGTH:
        matches = [name for name in by_lower if name.startswith(word.lower())]
    return by_lower[min(matches, key=len)] if matches else None


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """Return `; did you mean X?`, or an empty string."""
    guess = nearest(word, known) if isinstance(word, str) else None
    return f"; did you mean {guess!r}?" if guess else ""


def shown(value: Any, limit: int = 60) -> str:
    """`value` as JSON, truncated to `limit` characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= limit else text[: limit - 4] + " ..."
