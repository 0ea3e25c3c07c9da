"""The "source" block of a recipe, and the corpus that it names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from fgpt.data.corpus.base import Corpus
from fgpt.data.corpus.decode import Errors
from fgpt.data.corpus.hub import open_hub
from fgpt.data.corpus.listing import Listing, library
from fgpt.data.corpus.local import LocalFiles
from fgpt.data.corpus.readers import ReadOptions
from fgpt.errors import DataError

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


def open_corpus(spec: SourceSpec, errors: Errors) -> Corpus:
    """The corpus of a source. Raises DataError when there is none."""
    options = ReadOptions(spec.text_field, spec.document_separator, spec.document_start, errors)
    if spec.kind == "python-stdlib":
        return LocalFiles(library(), options)
    if spec.kind == "local":
        return LocalFiles(Listing(spec.path or ""), options)
    if spec.kind == "shards":
        raise DataError(
            f"{spec.path}: was put together by fgpt data merge or import; use that again"
        )
    return open_hub(
        spec.name or "",
        spec.config,
        spec.split,
        spec.revision,
        spec.data_files,
        spec.streaming,
        options,
    )
