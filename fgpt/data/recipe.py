"""A recipe: everything that decides what a prepared data set holds, in one JSON file."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fgpt.errors import DataError
from fgpt.tokenizer.spec import TokenizerSpec, spec_issues
from fgpt.utils.json_dataclass import from_json, read_json

Errors = Literal["strict", "replace", "skip"]
"""What happens to text that cannot be used; fgpt/prepare/sources/decode.py."""

_TAKEN = {
    "python-stdlib": "",
    "local": "path text_field document_separator",
    "shards": "path",
    "datasets": "name config split revision data_files streaming text_field document_start",
}
"""Kind of source -> the other keys that mean something to it."""


@dataclass(frozen=True)
class SourceSpec:
    """Where the text comes from."""

    kind: Literal["python-stdlib", "local", "datasets", "shards"]
    """The running Python's library sources, files of this machine, a Hugging Face data set, or
    (in the card of what `fgpt data` made) token shards."""
    path: str | None = None
    """Local: a file or folder, relative to the working directory. Shards: where they were."""
    text_field: str = "text"
    """Field of .jsonl, column of .parquet or of the data set that holds the text."""
    document_separator: str | None = None
    """Local: string between two documents of a text file; null: one document per file."""
    document_start: str | None = None
    """Datasets: regular expression that the first row of a document matches, where a row is a line
    (WikiText); null: each row is a document."""
    name: str | None = None
    """Datasets: name on the Hub, a folder, or a loader (json, parquet, text) with data_files."""
    config: str | None = None
    """Datasets: configuration of that name."""
    split: str = "train"
    """Datasets: split to read, such as train or train[:1%]."""
    revision: str | None = None
    """Datasets: commit, tag or branch on the Hub; null: the newest."""
    data_files: tuple[str, ...] = ()
    """Datasets: files or patterns for a loader."""
    streaming: bool = False
    """Datasets: read over the network, keep nothing on disk."""

    def faults(self) -> list[tuple[str, Any, str]]:
        """(key, value, what is expected) of every value that makes no sense."""
        found: list[tuple[str, Any, str]] = []
        for key, default in _DEFAULTS.items():
            value = getattr(self, key)
            if value != default and key not in _TAKEN[self.kind].split():
                found.append((key, value, f"has no effect on kind {self.kind}"))
        if self.kind in ("local", "shards") and not (self.path and self.path.isprintable()):
            found.append(("path", self.path, "give a file or folder with a printable name"))
        if self.kind == "datasets" and not self.name:
            found.append(("name", self.name, "give the data set's name"))
        if self.document_separator == "":
            found.append(("document_separator", "", "null or some text is expected"))
        if self.document_start is not None:
            found += _pattern_faults(self.document_start)
        return found


_DEFAULTS = {k: v for k, v in vars(SourceSpec("local")).items() if k != "kind"}


def _pattern_faults(pattern: str) -> list[tuple[str, Any, str]]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        return [("document_start", pattern, f"not a regular expression ({error})")]
    if compiled.match(""):
        return [("document_start", pattern, "it matches an empty row")]
    return []


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
    """Policy for text that cannot be used."""
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
    faults += spec_issues(recipe.tokenizer)

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
