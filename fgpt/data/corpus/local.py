"""A folder or file of this machine as a corpus."""

from __future__ import annotations

import errno
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fgpt.data.corpus.base import TASK_BYTES, Corpus, Interrupted, Task
from fgpt.data.corpus.decode import Flaw
from fgpt.data.corpus.readers import READERS, Items, ReadOptions
from fgpt.data.corpus.spans import (
    Span,
    check_unchanged,
    file_stamp,
    inner_suffix,
    separator_pattern,
    spans_of,
    walk,
)
from fgpt.errors import DataError

# errors of a disk or network, not of a file
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)
LIBRARY_SKIP = frozenset({"site-packages", "dist-packages", "__pycache__"})


class LocalFiles(Corpus):
    """Files in a fixed order; a task is a run of their spans."""

    def __init__(self, root: Path, files: list[Path], options: ReadOptions):
        """`root`: directory that the names in messages are relative to."""
        self.label, self.options = str(root), options
        self.files = len(files)
        self.root = root
        self.spans = [span for path in files for span in self._spans(path)]
        self.total_bytes = sum(span.size_bytes for span in self.spans)

    def _spans(self, path: Path) -> list[Span]:
        source = path.relative_to(self.root).as_posix()
        pattern: re.Pattern[bytes] | None = None
        if inner_suffix(path) == ".jsonl":
            pattern = re.compile(b"\n")
        elif self.options.separator is not None:
            pattern = separator_pattern(self.options.separator)
        try:
            found = spans_of(path, source, pattern)
        except OSError:
            found = []
        return found or [Span(path, source, 0, 0, 0, file_stamp(path))]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"spans": []}  # workers are given those of their tasks

    def tasks(self) -> Iterator[Task]:
        """See `Corpus.tasks`."""
        run: list[Span] = []
        size, number = 0, 0
        for span in self.spans:
            if run and size + span.size_bytes > TASK_BYTES:
                yield Task(number, size, tuple(run))
                run, size, number = [], 0, number + 1
            run.append(span)
            size += span.size_bytes
        yield Task(number, size, tuple(run))

    def read(self, task: Task) -> Items:
        """See `Corpus.read`."""
        for span in task.what:
            try:
                yield from READERS[inner_suffix(span.path)](span, self.options)
            except OSError as error:
                if error.errno in TRANSIENT:
                    raise Interrupted(f"{span.path}: {error.strerror}; run again") from error
                yield Flaw(span.source, f"cannot be read ({error.strerror or error})")
            check_unchanged(span)

    def stamp(self) -> str:
        """SHA-256 over names, sizes and times of change."""
        lines = (f"{span.source}\0{span.start}\0{span.end}\0{span.stamp}" for span in self.spans)
        return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def open_local(path: str, options: ReadOptions) -> LocalFiles:
    """A file, or the readable files of a folder. Raises DataError when there is none."""
    root = Path(path)
    if root.is_file():
        root, found = root.parent, [root]
    elif root.is_dir():
        found = walk(root, None)
    else:
        raise DataError(f"{root}: no such file or folder; give the corpus with --input")
    wanted = f"{' '.join(READERS)} files (all but the last also as .gz or .zst)"
    return LocalFiles(root, _usable(path, found, set(READERS), wanted), options)


def open_library(options: ReadOptions) -> LocalFiles:
    """The sources of the running Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    found = walk(root, LIBRARY_SKIP)
    wanted = "Python sources (install them, or use a local corpus)"
    files = [path for path in _usable(str(root), found, {".py"}, wanted) if path.suffix == ".py"]
    return LocalFiles(root, files, options)


def _usable(path: str, found: list[Path], suffixes: set[str], wanted: str) -> list[Path]:
    files = [file for file in found if inner_suffix(file) in suffixes and _readable_kind(file)]
    if not files:
        others = sorted({file.suffix or file.name for file in found})[:8]
        seen = f"; found only {', '.join(others)}" if others else "; it is empty"
        raise DataError(f"{path}: no usable file{seen}; needs {wanted}")
    return files


def _readable_kind(path: Path) -> bool:
    # a .parquet file is compressed inside
    return inner_suffix(path) != ".parquet" or path.suffix.lower() == ".parquet"
