"""A data set of Hugging Face's `datasets` as a corpus: from the Hub, or from files of this machine.

Not streaming, the data set lies in Arrow files of the cache and workers read rows from there.
Streaming, nothing is kept: the rows come through one process, which hands their text to workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import xxhash

from fgpt.errors import DataError
from fgpt.prepare.sources.corpus import TASK_BYTES, Corpus, Interrupted, Task
from fgpt.prepare.sources.decode import Flaw
from fgpt.prepare.sources.readers import Items, ReadOptions, no_field
from fgpt.prepare.sources.table_rows import as_bytes, column_flaw, joined, read_rows

ROWS_AT_A_TIME = 1000


class Rows(Corpus):
    """A data set in memory-mapped Arrow files."""

    def __init__(self, dataset: Any, label: str, options: ReadOptions):
        """`dataset`: a `datasets.Dataset`."""
        self.label, self.options, self.files = label, options, 0
        self.fingerprint: str = dataset._fingerprint
        self.total_rows: int = dataset.num_rows
        flaw = column_flaw(dataset.features.arrow_schema, options.text_field)
        if flaw:
            raise DataError(str(flaw.at(label)))
        self.dataset = dataset.select_columns([options.text_field]).with_format("arrow")
        share = dataset.data.nbytes / max(1, dataset.data.num_rows)
        self._row_bytes = max(1.0, share)
        self.total_bytes = round(self._row_bytes * self.total_rows)

    def tasks(self) -> Iterator[Task]:
        """See `Corpus.tasks`."""
        size = max(1, int(TASK_BYTES / self._row_bytes))
        if self.options.document_start is not None:
            size = max(1, self.total_rows)  # where a document begins is known from the start only
        for number, start in enumerate(range(0, self.total_rows, size)):
            rows = range(start, min(start + size, self.total_rows))
            yield Task(number, round(self._row_bytes * len(rows)), rows)

    def read(self, task: Task) -> Items:
        """See `Corpus.read`."""
        yield from read_rows(self._values(task.what), "rows", task.what.start, self.options)

    def _values(self, rows: range) -> Iterator[bytes | None]:
        for start in range(rows.start, rows.stop, ROWS_AT_A_TIME):
            table = self.dataset[start : min(start + ROWS_AT_A_TIME, rows.stop)]
            yield from as_bytes(table.column(0))

    def stamp(self) -> str:
        """The data set's own fingerprint."""
        return self.fingerprint


class Stream(Corpus):
    """A data set that is read from afar, once, in its own order."""

    def __init__(self, dataset: Any, label: str, options: ReadOptions, identity: str):
        """`dataset`: a `datasets.IterableDataset`."""
        self.label, self.options, self.files, self.total_bytes = label, options, 0, None
        self.identity = identity
        self.dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"dataset": None}  # workers are given the rows

    def tasks(self) -> Iterator[Task]:
        """See `Corpus.tasks`. Raises Interrupted if the source fails, DataError by the policy."""
        number, before, size = 0, 0, 0
        rows: list[bytes | Flaw | None] = []
        for value in self._texts():
            rows.append(value)
            size += len(value) if isinstance(value, bytes) else 0
            if size >= TASK_BYTES:
                yield self._task(number, size, before, rows)
                number, before, rows, size = number + 1, before + len(rows), [], 0
        if rows:
            yield self._task(number, size, before, rows)

    def _task(self, number: int, size: int, before: int, rows: list[bytes | Flaw | None]) -> Task:
        digest = xxhash.xxh3_128()
        for row in rows:
            data = row if isinstance(row, bytes) else repr(row).encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return Task(number, size, (before, rows), digest.hexdigest())

    def _texts(self) -> Iterator[bytes | Flaw | None]:
        rows = self._rows()
        if self.options.document_start is None:
            return rows
        return joined((row for row in rows if isinstance(row, bytes)), self.options.document_start)

    def _rows(self) -> Iterator[bytes | Flaw | None]:
        name = self.options.text_field
        try:
            for row in self.dataset:
                value = row.get(name)
                if isinstance(value, str):
                    yield value.encode(errors="surrogatepass")
                elif name not in row:
                    yield Flaw("", no_field("column", name, list(row)))
                elif value is None:
                    yield None
                else:
                    kind = type(value).__name__
                    yield Flaw("", f'"{name}" is {kind}, not a string')
        except _foreseen() as error:
            raise Interrupted(_explained(self.label, error)) from error

    def read(self, task: Task) -> Items:
        """See `Corpus.read`."""
        before, rows = task.what
        options = ReadOptions(errors=self.options.errors)  # the rows are joined already
        yield from read_rows(rows, "rows", before, options)

    def stamp(self) -> str:
        """Name, configuration, split and revision: the source itself is not looked at."""
        return hashlib.sha256(self.identity.encode()).hexdigest()


def open_hub(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    data_files: Iterable[str],
    streaming: bool,
    options: ReadOptions,
) -> Corpus:
    """Load a data set by name, or from files with a loader's name (json, parquet, text).

    Raises DataError: unknown name, configuration, split or column; no network.
    """
    import datasets

    files = list(data_files) or None
    label = " ".join([name, *([config] if config else []), f"[{split}]"])
    try:
        dataset = datasets.load_dataset(
            name, config, split=split, revision=revision, data_files=files, streaming=streaming
        )
    except _foreseen() as error:
        raise DataError(_explained(label, error)) from error
    if streaming:
        return Stream(dataset, label, options, f"{label} {revision} {files} {options.text_field}")
    return Rows(dataset, label, options)


def _foreseen() -> tuple[type[Exception], ...]:
    """What `datasets` raises for a wrong name, a broken file or a missing network."""
    import datasets.exceptions
    import pyarrow as pa

    return (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, pa.ArrowException)


def _explained(label: str, error: Exception) -> str:
    chain = [error, *([error.__cause__] if error.__cause__ else [])]
    lines = [(str(e).strip().splitlines() or [type(e).__name__])[0][:200] for e in chain]
    reason = ": ".join(lines)
    return f"{label}: cannot be loaded ({reason}); check name, config, split and network"
