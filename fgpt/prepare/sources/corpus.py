"""The interface of a source of text: tasks, and the documents of a task.

A task is about 16 MiB of text that one worker reads independently. The division into tasks and the
order of documents depend only on the source. Blank documents are left out and counted under every
policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fgpt.errors import DataError
from fgpt.prepare.sources.decode import Document, DocumentBatch, MalformedDocument
from fgpt.prepare.sources.readers import ReaderOutput, ReadOptions

TASK_BYTES = 2**24
FLAW_EXAMPLES = 20


class RetryableError(DataError):
    """An error of a disk, a network or a worker, not of the corpus: finished parts stay valid."""


@dataclass
class ReadStats:
    """Statistics of the documents read."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0  # blank documents, which are left out
    flawed: int = 0  # malformed documents and unreadable files, left out by errors = skip
    flaws: list[str] = field(default_factory=list)
    """The first FLAW_EXAMPLES of them, with the reason."""

    def add(self, later: ReadStats) -> None:
        """Add the statistics of documents read later."""
        self.documents += later.documents
        self.bytes += later.bytes
        self.empty += later.empty
        self.flawed += later.flawed
        self.flaws = (self.flaws + later.flaws)[:FLAW_EXAMPLES]


@dataclass(frozen=True)
class CorpusTask:
    """The unit of work: a part of a corpus that one worker reads."""

    number: int
    size_bytes: int
    payload: Any  # the corpus's own description of it; picklable
    digest: str = ""  # hash of its text, if the payload is the text; a later run compares it


class Corpus(ABC):
    """Documents in a fixed order. Picklable: workers read from copies."""

    label: str
    files: int  # number of files; 0 for a data set of the Hub
    total_bytes: int | None  # approximate size, the sum over the tasks; None if unknown
    options: ReadOptions
    left_out: Mapping[str, int] = MappingProxyType({})
    """Suffix -> number of files that are not read."""
    other_splits: Sequence[str] = ()
    """Splits of a data set that are not read."""

    @abstractmethod
    def tasks(self) -> Iterator[CorpusTask]:
        """Yield all tasks in order. May raise RetryableError."""

    @abstractmethod
    def read(self, task: CorpusTask) -> ReaderOutput:
        """Yield a task's documents, malformed ones included. Raises OSError, DataError."""

    @abstractmethod
    def stamp(self) -> str:
        """Return a hash that changes with the source, as far as its metadata show."""

    def has_changed(self) -> bool:
        """Return whether files were added or removed since opening."""
        return False


def read_documents(
    corpus: Corpus, stats: ReadStats, tasks: Iterable[CorpusTask] | None = None
) -> Iterator[Document]:
    """Yield the usable documents of these tasks (default: all), counted in `stats`.

    Raises DataError by the policy.
    """
    for task in corpus.tasks() if tasks is None else tasks:
        for batch in _apply_policy(corpus, stats, task):
            for data in batch.texts:
                if _is_blank(data):
                    stats.empty += 1
                else:
                    stats.documents += 1
                    stats.bytes += len(data)
                    yield Document(batch.source, data)


def read_batches(
    corpus: Corpus, stats: ReadStats, task: CorpusTask, size_bytes: int
) -> Iterator[list[bytes]]:
    """Yield the same texts of one task, in lists of about `size_bytes` across files."""
    texts: list[bytes] = []
    size = 0
    for batch in _apply_policy(corpus, stats, task):
        texts += batch.texts
        size += sum(map(len, batch.texts))
        if size >= size_bytes:
            yield from _without_blanks(texts, stats)
            texts, size = [], 0
    yield from _without_blanks(texts, stats)


def _without_blanks(texts: list[bytes], stats: ReadStats) -> Iterator[list[bytes]]:
    """Yield the usable texts as one list, unless it is empty."""
    usable = [data for data in texts if not _is_blank(data)]
    stats.empty += len(texts) - len(usable)
    stats.documents += len(usable)
    stats.bytes += sum(map(len, usable))
    if usable:
        yield usable


def _apply_policy(corpus: Corpus, stats: ReadStats, task: CorpusTask) -> Iterator[DocumentBatch]:
    """Yield a task's documents; count malformed ones (errors = skip), or raise DataError."""
    for item in corpus.read(task):
        if not isinstance(item, MalformedDocument):
            yield item
            continue
        if corpus.options.errors != "skip":
            raise DataError(f"{corpus.label}/{item}")
        stats.flawed += 1
        if len(stats.flaws) < FLAW_EXAMPLES:
            stats.flaws.append(str(item))


def _is_blank(data: bytes) -> bool:
    """Return whether a text is empty or white space, Unicode's included.

    The first character or 64 bytes decide for nearly all documents.
    """
    if b" " < data[:1] < b"\x7f":
        return False
    head = data[:64].decode(errors="ignore")
    return (not head or head.isspace()) and (not data or data.decode().isspace())
