"""Recipes: the JSON description of a data set's sources, tokenizer and split."""

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
"""Policy for malformed documents; see fgpt/prepare/sources/decode.py."""

_APPLICABLE_KEYS = {
    "python-stdlib": "",
    "local": "path text_field document_separator",
    "shards": "path",
    "datasets": "name config split revision data_files streaming text_field document_start",
}
"""Kind of source -> the other keys that apply to it."""


@dataclass(frozen=True)
class SourceSpec:
    """Where the text comes from."""

    kind: Literal["python-stdlib", "local", "datasets", "shards"]
    """The standard library of the running Python, local files, a Hugging Face data set, or token
    shards (in the cards of data sets written by `fgpt data merge` and `import`)."""
    path: str | tuple[str, ...] | None = None
    """Local: file or folder, relative to the working directory, or several. Shards: their paths."""
    text_field: str = "text"
    """Field of .jsonl, column of .parquet or of the data set that holds the text."""
    document_separator: str | None = None
    """Local: separator between documents of a text file; null: one document per file."""
    document_start: str | None = None
    """Datasets whose rows are lines (WikiText): regular expression matching the first row of each
    document; null: each row is a document."""
    name: str | None = None
    """Datasets: name on the Hub, folder, or loader (json, parquet, text) for data_files."""
    config: str | None = None
    split: str = "train"  # datasets: split to read, for example train or train[:1%]
    revision: str | None = None
    """Datasets: commit, tag or branch on the Hub; null: the default branch."""
    data_files: tuple[str, ...] = ()
    streaming: bool = False  # datasets: read over the network, without a copy on disk

    @property
    def paths(self) -> tuple[str, ...]:
        return self.path if isinstance(self.path, tuple) else (self.path or "",)

    def issues(self) -> list[tuple[str, Any, str]]:
        """Return (key, value, expectation) of every invalid value."""
        found: list[tuple[str, Any, str]] = []
        for key, default in _DEFAULTS.items():
            value = getattr(self, key)
            if value != default and key not in _APPLICABLE_KEYS[self.kind].split():
                found.append((key, value, f"has no effect on kind {self.kind}"))
        names = self.paths or ("",)
        if self.kind in ("local", "shards") and not all(n and n.isprintable() for n in names):
            found.append(("path", self.path, "expected a file or folder with a printable name"))
        if self.kind == "datasets" and not self.name:
            found.append(("name", self.name, "expected the data set's name"))
        if self.document_separator == "":
            found.append(("document_separator", "", "expected null or a non-empty string"))
        if self.document_start is not None:
            found += _pattern_issues(self.document_start)
        return found


_DEFAULTS = {k: v for k, v in vars(SourceSpec("local")).items() if k != "kind"}


def _pattern_issues(pattern: str) -> list[tuple[str, Any, str]]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        return [("document_start", pattern, f"expected a regular expression ({error})")]
    if compiled.match(""):
        return [("document_start", pattern, "expected a pattern that does not match an empty row")]
    return []


@dataclass(frozen=True)
class Recipe:
    """The sources, tokenizer and split of a data set; licence, size and notes are informative."""

    name: str  # name of the data set; its default directory is data/prepared/NAME
    source: SourceSpec
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    validation_fraction: float = 0.01
    """Fraction of the documents in the validation split; at least one document."""
    test_fraction: float = 0.0  # fraction of the documents in the test split; 0: no test split
    seed: int = 1234
    errors: Errors = "strict"
    licence: str = ""
    size: str = ""
    expected_tokens: int | None = None
    """Approximate result; a difference of more than a quarter prints a note."""
    notes: str = ""

    def digest(self) -> str:
        """Return the SHA-256 of all fields except the name and the informative ones."""
        content = asdict(self)
        for key in ("name", "licence", "size", "expected_tokens", "notes"):
            del content[key]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file strictly. Raises DataError naming every issue."""
    return check_recipe(from_json(Recipe, read_json(Path(path)), str(path)), str(path))


def check_recipe(recipe: Recipe, where: str) -> Recipe:
    """Return `recipe` if it is valid; else raise DataError naming every invalid value."""
    issues = [f'"source.{key}" is {value!r}; {want}' for key, value, want in recipe.source.issues()]
    issues += spec_issues(recipe.tokenizer)

    def require(is_valid: bool, key: str, expectation: str) -> None:
        if not is_valid:
            issues.append(f'"{key}" is {getattr(recipe, key)!r}; {expectation}')

    require(bool(re.fullmatch(r"[\w.-]+", recipe.name)), "name", "use only A-Z a-z 0-9 . _ -")
    valid, test = recipe.validation_fraction, recipe.test_fraction
    require(0 < valid < 1, "validation_fraction", "expected a number between 0 and 1")
    require(0 <= test < 1, "test_fraction", "expected 0 or a number below 1")
    require(valid + test < 1, "test_fraction", "expected a sum with validation_fraction below 1")
    require(0 <= recipe.seed < 2**63, "seed", "expected 0 .. 2^63 - 1")
    tokens = recipe.expected_tokens
    require(tokens is None or tokens > 0, "expected_tokens", "expected null or a positive number")
    if issues:
        raise DataError(f"{where}: " + "; ".join(issues))
    return recipe
