"""A corpus: documents as an iterator, in an order that depends on nothing but the files.

1. `open_corpus` lists the files of a source, sorted by path.
2. `Corpus.documents` reads them one after the other (readers.py) and applies the policy for flaws
   (decode.py). Documents that are empty or only blanks are left out and counted under every policy.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fgpt.data.decode import Document, Errors, Flaw
from fgpt.data.readers import READERS, ReadOptions
from fgpt.errors import DataError

FLAW_EXAMPLES = 20


@dataclass(frozen=True)
class SourceSpec:
    """Where the text comes from: the "source" block of a recipe."""

    kind: Literal["python-stdlib", "local"]
    """The running Python's library sources, or files of this machine."""
    path: str | None = None
    """Local: a file or folder, relative to the working directory."""
    text_field: str = "text"
    """Local: field of .jsonl or column of .parquet that holds the text."""
    document_separator: str | None = None
    """Local: string between two documents of a text file; null: one document per file."""


@dataclass
class Tally:
    """What one pass over a corpus found."""

    documents: int = 0
    """Documents yielded."""
    bytes: int = 0
    """Their size, in UTF-8 bytes."""
    empty: int = 0
    """Documents left out because they were empty or blank."""
    flawed: int = 0
    """Documents or files left out by errors = skip."""
    flaws: list[str] = field(default_factory=list)
    """The first FLAW_EXAMPLES of them."""


@dataclass(frozen=True)
class Corpus:
    """Files in a fixed order and the way to read them."""

    root: Path
    """Directory the documents' names are relative to."""
    files: tuple[Path, ...]
    """Every file, in reading order."""
    options: ReadOptions
    """How they are read."""

    @property
    def file_bytes(self) -> int:
        """Size of all readable files, in bytes."""
        return sum(path.stat().st_size for path in self.files if path.exists())

    def documents(self, tally: Tally) -> Iterator[Document]:
        """Yield the documents, counting into `tally`. Raises DataError by the policy."""
        for path in self.files:
            for item in self._read(path):
                if isinstance(item, Flaw):
                    self._forgive(item, tally)
                elif not item.text or item.text.isspace():
                    tally.empty += 1
                else:
                    tally.documents += 1
                    tally.bytes += len(item.text.encode())
                    yield item

    def _read(self, path: Path) -> Iterator[Document | Flaw]:
        source = path.relative_to(self.root).as_posix()
        try:
            yield from READERS[path.suffix.lower()](path, source, self.options)
        except OSError as error:
            yield Flaw(source, f"cannot be read ({error.strerror or error})")

    def _forgive(self, flaw: Flaw, tally: Tally) -> None:
        if self.options.errors != "skip":
            raise DataError(f"{self.root}/{flaw}")
        tally.flawed += 1
        if len(tally.flaws) < FLAW_EXAMPLES:
            tally.flaws.append(str(flaw))


def open_corpus(spec: SourceSpec, errors: Errors) -> Corpus:
    """List the files of a source. Raises DataError when there is none."""
    options = ReadOptions(spec.text_field, spec.document_separator, errors)
    if spec.kind == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        skip = {"site-packages", "dist-packages", "__pycache__"}
        found = _walk(root, lambda name: name in skip)
        files = [path for path in found if path.suffix == ".py"]
        wanted = "Python sources (install them, or use a local corpus)"
    else:
        root = Path(spec.path or "")
        if root.is_file():
            root, found = root.parent, [root]
        elif root.is_dir():
            found = _walk(root, lambda name: name.startswith("."))
        else:
            raise DataError(f"{root}: no such file or folder; give the corpus with --input")
        files = [path for path in found if path.suffix.lower() in READERS]
        wanted = f"{' '.join(READERS)} files (unpack archives, rename texts)"
    if not files:
        others = sorted({path.suffix or path.name for path in found})[:8]
        seen = f"; found only {', '.join(others)}" if others else "; it is empty"
        raise DataError(f"{spec.path or root}: no usable file{seen}; needs {wanted}")
    return Corpus(root, tuple(files), options)


def _walk(root: Path, skip: Callable[[str], bool]) -> list[Path]:
    """Every file below `root`, sorted by its path's parts; links to folders are not followed."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not skip(name)]
        found += [Path(folder, name) for name in names if not skip(name)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)
