"""What the pipeline knows of a source of text: tasks, and the documents of a task.

A task is about 16 MiB of text that a worker reads by itself. Which documents are in which task, and
their order, depend on nothing but the source. Documents that are empty or only blanks are left out
and counted under every policy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fgpt.errors import DataError
from fgpt.prepare.sources.decode import Document, Flaw, Texts
from fgpt.prepare.sources.readers import Items, ReadOptions

TASK_BYTES = 2**24
FLAW_EXAMPLES = 20


class Interrupted(DataError):
    """The work ended through no fault of the corpus or the recipe: what is finished is good."""


@dataclass
class Tally:
    """What reading found."""

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

    def add(self, other: Tally) -> None:
        """Count in what was read after this."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.empty += other.empty
        self.flawed += other.flawed
        self.flaws = (self.flaws + other.flaws)[:FLAW_EXAMPLES]


@dataclass(frozen=True)
class Task:
    """One piece of a corpus, for one worker."""

    number: int
    """Its place in the corpus, from 0."""
    size_bytes: int
    """About how much there is to read."""
    what: Any
    """What its corpus needs to find it; picklable."""
    digest: str = ""
    """Hash of its text, where it comes with the task and may be other text the next time."""


class Corpus(ABC):
    """A source of documents in a fixed order. Picklable: workers read from copies."""

    label: str
    """Its name in messages."""
    files: int
    """Number of files; of a data set that is not files, 0."""
    total_bytes: int | None
    """About how much there is to read, the sum over the tasks; None: not known beforehand."""
    options: ReadOptions
    """How it is read."""

    @abstractmethod
    def tasks(self) -> Iterator[Task]:
        """Every task, in order."""

    @abstractmethod
    def read(self, task: Task) -> Items:
        """A task's documents and flaws. Raises OSError, DataError."""

    @abstractmethod
    def stamp(self) -> str:
        """What changes when the source does, as far as a look at it tells."""

    def has_changed(self) -> bool:
        """Whether there are other files than at the beginning, as far as a look tells."""
        return False


def documents(
    corpus: Corpus, tally: Tally, tasks: Iterable[Task] | None = None
) -> Iterator[Document]:
    """The usable documents of these tasks (default: all), counted into `tally`.

    Raises DataError by the policy.
    """
    for task in corpus.tasks() if tasks is None else tasks:
        for some in _texts(corpus, tally, task):
            for data in some.data:
                if _is_blank(data):
                    tally.empty += 1
                else:
                    tally.documents += 1
                    tally.bytes += len(data)
                    yield Document(some.source, data)


def batches(corpus: Corpus, tally: Tally, task: Task, size_bytes: int) -> Iterator[list[bytes]]:
    """The same texts of one task, in lists of about `size_bytes`, whatever a file holds."""
    batch: list[bytes] = []
    size = 0
    for some in _texts(corpus, tally, task):
        batch += some.data
        size += sum(map(len, some.data))
        if size >= size_bytes:
            yield from _counted(batch, tally)
            batch, size = [], 0
    yield from _counted(batch, tally)


def _counted(batch: list[bytes], tally: Tally) -> Iterator[list[bytes]]:
    """The usable ones, if there are any."""
    usable = [data for data in batch if not _is_blank(data)]
    tally.empty += len(batch) - len(usable)
    tally.documents += len(usable)
    tally.bytes += sum(map(len, usable))
    if usable:
        yield usable


def _texts(corpus: Corpus, tally: Tally, task: Task) -> Iterator[Texts]:
    for item in corpus.read(task):
        if isinstance(item, Flaw):
            _forgive(corpus, item, tally)
        else:
            yield item


def _is_blank(data: bytes) -> bool:
    """Whether a text is empty or all white space, Unicode's included; a look at its head decides
    for nearly all.
    """
    if b" " < data[:1] < b"\x7f":
        return False
    head = data[:64].decode(errors="ignore")
    return (not head or head.isspace()) and (not data or data.decode().isspace())


def _forgive(corpus: Corpus, flaw: Flaw, tally: Tally) -> None:
    if corpus.options.errors != "skip":
        raise DataError(f"{corpus.label}/{flaw}")
    tally.flawed += 1
    if len(tally.flaws) < FLAW_EXAMPLES:
        tally.flaws.append(str(flaw))
