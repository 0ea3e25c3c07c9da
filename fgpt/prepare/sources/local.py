"""Local files as a corpus."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fgpt.errors import DataError
from fgpt.prepare.sources.corpus import TASK_BYTES, Corpus, CorpusTask, RetryableError
from fgpt.prepare.sources.decode import MalformedDocument
from fgpt.prepare.sources.readers import (
    PLAIN_SUFFIXES,
    READERS,
    ReaderOutput,
    ReadOptions,
    has_json_line,
    read_jsonl,
    read_plain_file,
)
from fgpt.prepare.sources.spans import (
    COMPRESSIONS,
    Span,
    check_unchanged,
    file_stamp,
    inner_suffix,
    separator_pattern,
    spans_of,
    whole_file,
)

LIBRARY_SKIP = frozenset({"site-packages", "dist-packages", "__pycache__"})
# errors of the disk or network, not of a file
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)


class FoundFiles(NamedTuple):
    """The files below a path."""

    names: list[str]
    """Those to read, relative to `FileListing.root`, sorted by path components."""
    left_out: Counter[str]
    """Suffix -> number of the others."""


@dataclass(frozen=True)
class FileListing:
    """The files of a corpus: those with known suffixes, or the standard library's sources."""

    path: str
    is_library: bool = False
    """True: .py files without installed packages; else all known suffixes without hidden files."""
    text_field: str = "text"
    """A .json file in a folder, which may hold settings, is read if its first line is an object
    with this field."""

    @property
    def root(self) -> str:
        return self.path if os.path.isdir(self.path) else os.path.dirname(self.path) or "."

    def find(self) -> FoundFiles:
        """List the files. Symlinks to folders are not followed.

        Raises DataError: no usable file, unreadable path.
        """
        try:
            mode = os.stat(self.path).st_mode
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); grant access, or give another --input"
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                problem = "no such file or folder; give the corpus with --input"
            raise DataError(f"{self.path}: {problem}") from error
        if stat.S_ISDIR(mode):
            names = self._walk()
            usable = {name for name in names if self._is_usable(name)}
        elif stat.S_ISREG(mode):
            names = [os.path.basename(self.path)]
            usable = {name for name in names if self._has_known_suffix(name)}
        else:
            raise DataError(f"{self.path}: neither a file nor a folder; copy its text to a file")
        others = [name for name in names if name not in usable]
        left_out = Counter(map(_full_suffix, others))
        if not usable:
            suffixes = sorted(left_out)[:8]
            contents = f"found only {', '.join(suffixes)}" if suffixes else "it is empty"
            expected = "Python sources (install them, or use a local corpus)"
            if not self.is_library:
                expected = f"{' '.join(READERS)} files (all but the last also as .gz or .zst)"
            if any(suffix.startswith(".json") for suffix in suffixes):
                expected += f', .json with an object that has "{self.text_field}" on each line'
                expected += " (--text_field)"
            raise DataError(f"{self.path}: no usable file; {contents}; needs {expected}")
        return FoundFiles(sorted(usable, key=lambda name: name.split("/")), left_out)

    def _walk(self) -> list[str]:
        names: list[str] = []
        folders = [""]
        while folders:
            prefix = folders.pop()
            for entry in self._entries(prefix):
                if not _is_folder(entry):
                    names.append(prefix + entry.name)
                elif not entry.is_symlink():
                    folders.append(f"{prefix}{entry.name}/")
        return names

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        folder = os.path.join(self.path, prefix)
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if self._is_included(entry.name)]
        except OSError as error:
            problem = f"cannot be read ({error.strerror}); grant access, or move it away"
            raise DataError(f"{folder.rstrip(os.sep)}: {problem}") from error

    def _is_included(self, name: str) -> bool:
        return name not in LIBRARY_SKIP if self.is_library else not name.startswith(".")

    def _is_usable(self, name: str) -> bool:
        if self.is_library:
            return name.endswith(".py")
        if not self._has_known_suffix(name):
            return False
        if name.endswith(PLAIN_SUFFIXES) or inner_suffix(name) != ".json":
            return True
        # settings are not compressed: a .json.gz holds rows, and one without the field is an error
        field = self.text_field if name.lower().endswith(".json") else None
        return has_json_line(os.path.join(self.path, name), field)

    def _has_known_suffix(self, name: str) -> bool:
        if name.endswith(PLAIN_SUFFIXES):
            return True
        suffix = inner_suffix(name)
        # .parquet files are compressed internally: .parquet.gz is not supported
        return suffix in READERS and (suffix != ".parquet" or name.lower().endswith(suffix))


def _full_suffix(name: str) -> str:
    """Return .json for a.json, .json.gz for a.json.gz, the name of a file without suffix."""
    base = os.path.basename(name)
    stem, suffix = os.path.splitext(base)
    inner = os.path.splitext(stem)[1] if suffix.lower() in COMPRESSIONS else ""
    return (inner + suffix).lower() or base


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink cycle
        return False


def standard_library() -> FileListing:
    """Return the sources of the running Python's standard library."""
    return FileListing(sysconfig.get_path("stdlib"), is_library=True)


class LocalCorpus(Corpus):
    """Files in a fixed order; a task is a run of their spans."""

    def __init__(self, listings: Sequence[FileListing], options: ReadOptions):
        """Stat every file. Raises DataError if one of `listings` has none."""
        self.listings, self.options = listings, options
        self.label = listings[0].root
        if len(listings) > 1:
            self.label = os.path.commonpath([os.path.abspath(each.root) for each in listings])
        self.names, self.left_out = self._find()
        self.files = len(self.names)
        self.spans = [span for name in self.names for span in self._spans(name)]
        self.total_bytes = sum(span.size_bytes for span in self.spans)

    def _find(self) -> FoundFiles:
        """List all files, relative to `label`; one that is named twice once."""
        names, left_out = dict[str, None](), Counter[str]()
        for listing in self.listings:
            found = listing.find()
            if not listing.is_library:  # which is known to hold more than sources
                left_out += found.left_out
            folder = os.path.relpath(listing.root, self.label) if len(self.listings) > 1 else "."
            inside = (os.path.normpath(os.path.join(folder, name)) for name in found.names)
            names |= dict.fromkeys(found.names if folder == "." else inside)
        return FoundFiles(list(names), left_out)

    def _spans(self, source: str) -> list[Span]:
        path = os.path.join(self.label, source)
        if self.options.separator is None and source.endswith(PLAIN_SUFFIXES):
            return [whole_file(path, source)]
        pattern: re.Pattern[bytes] | None = None
        if READERS[inner_suffix(path)] is read_jsonl:
            pattern = re.compile(b"\n")
        elif self.options.separator is not None:
            pattern = separator_pattern(self.options.separator)
        try:
            spans = spans_of(path, source, pattern)
        except OSError:
            spans = []
        return spans or [Span(path, source, 0, 0, 0, file_stamp(path))]

    def __getstate__(self) -> dict[str, Any]:
        # workers receive the spans of their tasks
        return self.__dict__ | {"spans": [], "names": []}

    def tasks(self) -> Iterator[CorpusTask]:
        spans: list[Span] = []
        size, number = 0, 0
        for span in self.spans:
            if spans and size + span.size_bytes > TASK_BYTES:
                yield CorpusTask(number, size, tuple(spans))
                spans, size, number = [], 0, number + 1
            spans.append(span)
            size += span.size_bytes
        yield CorpusTask(number, size, tuple(spans))

    def read(self, task: CorpusTask) -> ReaderOutput:
        has_separator, errors = self.options.separator is not None, self.options.errors
        for span in task.payload:
            try:
                if not has_separator and span.path.endswith(PLAIN_SUFFIXES):
                    yield read_plain_file(span, errors)
                    continue
                yield from READERS[inner_suffix(span.path)](span, self.options)
            except OSError as error:
                if error.errno in TRANSIENT:
                    raise RetryableError(f"{span.path}: {error.strerror}; run again") from error
                problem = f"cannot be read ({error.strerror or error})"
                yield MalformedDocument(span.source, problem)
            check_unchanged(span)

    def stamp(self) -> str:
        """Return the SHA-256 of names, sizes and modification times."""
        lines = (f"{span.source}\0{span.start}\0{span.end}\0{span.stamp}" for span in self.spans)
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()

    def has_changed(self) -> bool:
        # changes of a file's content were detected when it was read
        return self._find().names != self.names
