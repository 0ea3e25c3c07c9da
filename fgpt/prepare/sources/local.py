"""A folder or file of this machine as a corpus."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from typing import Any

from fgpt.prepare.sources.corpus import TASK_BYTES, Corpus, Interrupted, Task
from fgpt.prepare.sources.decode import Flaw
from fgpt.prepare.sources.formats import PLAIN, READERS
from fgpt.prepare.sources.listing import Listing
from fgpt.prepare.sources.readers import Items, ReadOptions, read_file
from fgpt.prepare.sources.spans import (
    Span,
    check_unchanged,
    file_stamp,
    inner_suffix,
    separator_pattern,
    spans_of,
    whole_file,
)

# errors of a disk or network, not of a file
TRANSIENT = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE)


class LocalFiles(Corpus):
    """Files in a fixed order; a task is a run of their spans."""

    def __init__(self, listing: Listing, options: ReadOptions):
        """Look at every file. Raises DataError when there is none."""
        self.listing, self.options = listing, options
        self.label = listing.root
        self.names = listing.names()
        self.files = len(self.names)
        self.spans = [span for name in self.names for span in self._spans(name)]
        self.total_bytes = sum(span.size_bytes for span in self.spans)

    def _spans(self, source: str) -> list[Span]:
        path = os.path.join(self.label, source)
        if self.options.separator is None and source.endswith(PLAIN):
            return [whole_file(path, source)]
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
        # workers are given those of their tasks
        return self.__dict__ | {"spans": [], "names": []}

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
        is_cut, errors = self.options.separator is not None, self.options.errors
        for span in task.what:
            try:
                if not is_cut and span.path.endswith(PLAIN):
                    yield read_file(span, errors)
                    continue
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

    def has_changed(self) -> bool:
        """See `Corpus.has_changed`; what was read was compared then."""
        return self.listing.names() != self.names
