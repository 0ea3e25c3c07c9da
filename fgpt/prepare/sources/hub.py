"""Data sets of Hugging Face's library `datasets` as a corpus: from the Hub, or from local files.

Without streaming, workers read rows from the Arrow files in the cache. With streaming, the parent
process downloads the rows and sends their text to the workers; nothing is cached.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Any

import xxhash

from fgpt.data.recipe import SourceSpec
from fgpt.errors import DataError, FgptError
from fgpt.prepare.sources.corpus import TASK_BYTES, Corpus, CorpusTask, RetryableError
from fgpt.prepare.sources.decode import MalformedDocument
from fgpt.prepare.sources.readers import (
    ReaderOutput,
    ReadOptions,
    TableRow,
    check_column,
    column_bytes,
    join_rows,
    missing_field,
    read_rows,
)

ROWS_PER_READ = 1000


class ArrowCorpus(Corpus):
    """A data set in memory-mapped Arrow files."""

    def __init__(self, dataset: Any, label: str, options: ReadOptions):
        self.label, self.options, self.files = label, options, 0
        self.fingerprint: str = dataset._fingerprint
        self.total_rows: int = dataset.num_rows
        malformed = check_column(dataset.features.arrow_schema, options.text_field)
        if malformed:
            raise DataError(str(malformed.within(label)))
        self.dataset = dataset.select_columns([options.text_field]).with_format("arrow")
        self._row_bytes = max(1.0, dataset.data.nbytes / max(1, dataset.data.num_rows))
        self.total_bytes = round(self._row_bytes * self.total_rows)

    def tasks(self) -> Iterator[CorpusTask]:
        size = max(1, int(TASK_BYTES / self._row_bytes))
        if self.options.document_start is not None:
            size = max(1, self.total_rows)  # documents are found by reading from the first row on
        for number, start in enumerate(range(0, self.total_rows, size)):
            rows = range(start, min(start + size, self.total_rows))
            yield CorpusTask(number, round(self._row_bytes * len(rows)), rows)

    def read(self, task: CorpusTask) -> ReaderOutput:
        yield from read_rows(self._values(task.payload), "rows", task.payload.start, self.options)

    def _values(self, rows: range) -> Iterator[bytes | None]:
        for start in range(rows.start, rows.stop, ROWS_PER_READ):
            table = self.dataset[start : min(start + ROWS_PER_READ, rows.stop)]
            yield from column_bytes(table.column(0))

    def stamp(self) -> str:
        """Return the data set's fingerprint, computed by `datasets`."""
        return self.fingerprint


class StreamingCorpus(Corpus):
    """A data set that is downloaded while it is read, in its own order."""

    def __init__(self, dataset: Any, label: str, options: ReadOptions, identity: str):
        self.label, self.options, self.files, self.total_bytes = label, options, 0, None
        self.identity = identity
        self.dataset = dataset

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"dataset": None}  # workers receive the rows

    def tasks(self) -> Iterator[CorpusTask]:
        """See `Corpus.tasks`. Raises RetryableError if the download fails."""
        number, before, size = 0, 0, 0
        rows: list[TableRow] = []
        for value in self._texts():
            rows.append(value)
            size += len(value) if isinstance(value, bytes) else 0
            if size >= TASK_BYTES:
                yield self._task(number, size, before, rows)
                number, before, rows, size = number + 1, before + len(rows), [], 0
        if rows:
            yield self._task(number, size, before, rows)

    def _task(self, number: int, size: int, before: int, rows: list[TableRow]) -> CorpusTask:
        digest = xxhash.xxh3_128()
        for row in rows:
            if isinstance(row, MalformedDocument):  # the form that existing parts were hashed with
                row = f"Flaw(where={row.location!r}, what={row.problem!r})".encode()
            data = row if isinstance(row, bytes) else b"None"
            digest.update(len(data).to_bytes(8, "little") + data)
        return CorpusTask(number, size, (before, rows), digest.hexdigest())

    def _texts(self) -> Iterator[TableRow]:
        rows = self._rows()
        if self.options.document_start is None:
            return rows
        texts = (row for row in rows if isinstance(row, bytes))
        return join_rows(texts, self.options.document_start)

    def _rows(self) -> Iterator[TableRow]:
        name = self.options.text_field
        try:
            for row in self.dataset:
                value = row.get(name)
                if isinstance(value, str):
                    yield value.encode(errors="surrogatepass")
                elif name not in row:
                    yield missing_field("column", name, list(row))
                elif value is None:
                    yield None
                else:
                    kind = type(value).__name__
                    yield MalformedDocument("", f'"{name}" is {kind}, not a string')
        except Exception as error:  # as above
            raise RetryableError(_explain(self.label, error)) from error

    def read(self, task: CorpusTask) -> ReaderOutput:
        before, rows = task.payload
        options = ReadOptions(errors=self.options.errors)  # rows were already joined
        yield from read_rows(rows, "rows", before, options)

    def stamp(self) -> str:
        """Return a hash of name, configuration, split and revision; not of the remote data."""
        return hashlib.sha256(self.identity.encode()).hexdigest()


def open_hub(spec: SourceSpec, options: ReadOptions) -> Corpus:
    """Load a data set by name, or files by the name of a loader (json, parquet, text), or a folder
    that `save_to_disk` wrote.

    Raises DataError: unknown name, configuration, split or column; no network.
    """
    import datasets

    files = list(spec.data_files) or None
    label = " ".join(filter(None, (spec.name, spec.config, f"[{spec.split}]")))
    try:
        if spec.name and is_saved_dataset(spec.name):
            rows, others = _load_saved(spec.name, spec.split)
            corpus = ArrowCorpus(rows, label, options)
            corpus.other_splits = others
            return corpus
        dataset = datasets.load_dataset(
            spec.name,
            spec.config,
            split=spec.split,
            revision=spec.revision,
            data_files=files,
            streaming=spec.streaming,
        )
    except FgptError:
        raise
    except Exception as error:  # the library and its loaders raise errors of any kind
        raise DataError(_explain(label, error)) from error
    if spec.streaming:
        identity = f"{label} {spec.revision} {files} {options.text_field}"
        return StreamingCorpus(dataset, label, options, identity)
    return ArrowCorpus(dataset, label, options)


def is_saved_dataset(path: str) -> bool:
    """Return whether `save_to_disk` of the library `datasets` wrote this folder."""
    names = ("state.json", "dataset_info.json")
    is_dataset = all(os.path.isfile(os.path.join(path, name)) for name in names)
    return is_dataset or os.path.isfile(os.path.join(path, "dataset_dict.json"))


def _load_saved(path: str, split: str) -> tuple[Any, list[str]]:
    """Return the rows of `split` (as in train[:1%]), and the names of the other splits.

    A folder without splits is all train.
    """
    import datasets

    saved = datasets.load_from_disk(path)
    splits = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    sizes = {name: rows.num_rows for name, rows in splits.items()}
    chosen = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    parts = [splits[part.splitname].select(range(part.from_, part.to)) for part in chosen]
    others = splits.keys() - {part.splitname for part in chosen}
    return datasets.concatenate_datasets(parts), sorted(others)


def _explain(label: str, error: Exception) -> str:
    chain = [error, *([error.__cause__] if error.__cause__ else [])]
    lines = [(str(e).strip().splitlines() or [type(e).__name__])[0][:200] for e in chain]
    reason = ": ".join(lines)
    if isinstance(error, StopIteration):
        reason = "no rows, or no file of that name"
    return f"{label}: cannot be loaded ({reason}); check name, config, split, files and network"
