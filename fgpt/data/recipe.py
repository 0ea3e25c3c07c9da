"""A recipe: everything that decides what a prepared data set holds, in one JSON file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fgpt.data.corpus import SourceSpec
from fgpt.data.decode import Errors
from fgpt.data.fields import from_json, read_json
from fgpt.data.tokenizer.spec import TokenizerSpec, spec_faults
from fgpt.errors import DataError


@dataclass(frozen=True)
class Recipe:
    """One corpus, one tokenizer, one split."""

    name: str
    """Name of the data set; by convention also of its directory under data/prepared."""
    source: SourceSpec
    """Where the text comes from."""
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    """How it becomes ids."""
    validation_fraction: float = 0.01
    """Share of the documents held out for validation (no unit); at least one document is."""
    seed: int = 1234
    """Seed of the split (no unit)."""
    errors: Errors = "strict"
    """Policy for text that cannot be used: strict, replace or skip (fgpt/data/decode.py)."""
    licence: str = ""
    """Licence of the text; for the reader."""
    size: str = ""
    """Size to expect; for the reader."""
    notes: str = ""
    """Anything else; for the reader."""

    def digest(self) -> str:
        """SHA-256 of what decides the data: all fields but name, licence, size and notes."""
        content = asdict(self)
        for key in ("name", "licence", "size", "notes"):
            del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file strictly. Raises DataError naming every fault."""
    return check_recipe(from_json(Recipe, read_json(Path(path)), str(path)), str(path))


def check_recipe(recipe: Recipe, where: str) -> Recipe:
    """Return `recipe` if its values make sense; else raise DataError naming all that do not."""
    source, faults = recipe.source, []

    def need(good: bool, key: str, value: Any, want: str) -> None:
        if not good:
            faults.append(f'"{key}" is {value!r}; {want}')

    need(bool(re.fullmatch(r"[\w.-]+", recipe.name)), "name", recipe.name, "use A-Z a-z 0-9 . _ -")
    fraction = recipe.validation_fraction
    need(0 < fraction < 1, "validation_fraction", fraction, "between 0 and 1 is expected")
    need(0 <= recipe.seed < 2**63, "seed", recipe.seed, "0 .. 2^63 - 1 is expected")
    local = source.kind == "local"
    need((source.path or "").isprintable(), "source.path", source.path, "rename the folder")
    need(bool(source.path) == local, "source.path", source.path, "give it for kind local, only")
    if not local:
        need(
            source == SourceSpec(source.kind, source.path), "source", source.kind, "has no options"
        )
    faults += spec_faults(recipe.tokenizer)
    separator = source.document_separator
    need(separator != "", "source.document_separator", separator, "null or some text is expected")
    if faults:
        raise DataError(f"{where}: " + "; ".join(faults))
    return recipe
