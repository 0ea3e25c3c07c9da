"""A recipe: everything that decides what a prepared data set holds, in one JSON file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fgpt.data.corpus.decode import Errors
from fgpt.data.corpus.source import SourceSpec
from fgpt.data.tokenizer.spec import TokenizerSpec, spec_faults
from fgpt.errors import DataError
from fgpt.utils.json_dataclass import from_json, read_json


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
    test_fraction: float = 0.0
    """Share of the documents held out for a test split (no unit); 0: there is none."""
    seed: int = 1234
    """Seed of the split (no unit)."""
    errors: Errors = "strict"
    """Policy for text that cannot be used: strict, replace or skip (fgpt/data/corpus/decode.py)."""
    licence: str = ""
    """Licence of the text; for the reader."""
    size: str = ""
    """Size to expect; for the reader."""
    expected_tokens: int | None = None
    """Tokens it should come to, about; for the reader, who is told if it comes to others."""
    notes: str = ""
    """Anything else; for the reader."""

    def digest(self) -> str:
        """SHA-256 of what decides the data: all fields but those for the reader."""
        content = asdict(self)
        for key in ("name", "licence", "size", "expected_tokens", "notes"):
            del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file strictly. Raises DataError naming every fault."""
    return check_recipe(from_json(Recipe, read_json(Path(path)), str(path)), str(path))


def check_recipe(recipe: Recipe, where: str) -> Recipe:
    """Return `recipe` if its values make sense; else raise DataError naming all that do not."""
    faults = [f'"source.{key}" is {value!r}; {what}' for key, value, what in recipe.source.faults()]
    faults += spec_faults(recipe.tokenizer)

    def need(good: bool, key: str, want: str) -> None:
        if not good:
            faults.append(f'"{key}" is {getattr(recipe, key)!r}; {want}')

    need(bool(re.fullmatch(r"[\w.-]+", recipe.name)), "name", "use A-Z a-z 0-9 . _ -")
    valid, test = recipe.validation_fraction, recipe.test_fraction
    need(0 < valid < 1, "validation_fraction", "between 0 and 1 is expected")
    need(0 <= test < 1, "test_fraction", "0 .. 1, 1 excluded, is expected")
    need(valid + test < 1, "test_fraction", "with validation_fraction nothing is left to train on")
    need(0 <= recipe.seed < 2**63, "seed", "0 .. 2^63 - 1 is expected")
    tokens = recipe.expected_tokens
    need(tokens is None or tokens > 0, "expected_tokens", "null or a number above 0 is expected")
    if faults:
        raise DataError(f"{where}: " + "; ".join(faults))
    return recipe
