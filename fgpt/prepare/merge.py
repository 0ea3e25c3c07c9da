"""Parts, in their order -> the splits of a data set.

A document is validation if its split key is below the first limit, test if below the second, else
training; so which split it is in depends on its text and the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from fgpt.data.shards import ShardInfo
from fgpt.errors import DataError
from fgpt.prepare.parts import Part, read_ids, read_table
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.prepare.split import Limits


def source_digest(folder: Path, parts: Sequence[Part]) -> str:
    """SHA-256 over the documents' hashes (`split.text_hash`), in reading order."""
    digest = hashlib.sha256()
    for table in tables(folder, parts):
        digest.update(table["digest"].tobytes())
    return digest.hexdigest()


def tables(folder: Path, parts: Sequence[Part]) -> Iterator[np.ndarray]:
    """The table of documents of each part."""
    return (read_table(folder, part) for part in parts)


def write_splits(
    folder: Path, parts: Iterable[Part], limits: Limits, vocab_size: int, out: Path
) -> dict[str, ShardInfo]:
    """Write OUT/train, OUT/valid and, if the limits leave room for it, OUT/test."""
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(out / name, vocab_size)) for name in limits.names
        }
        for part in parts:
            table = read_table(folder, part)
            ids = read_ids(folder, part, writers["train"].dtype)
            if len(ids) != table["tokens"].sum(dtype=np.int64):
                raise DataError(f"{folder}: part {part.number} is damaged; remove it and run again")
            for first, last, side in _runs(limits.side(table["key"])):
                lengths = table["tokens"][first:last]
                count = int(lengths.sum(dtype=np.int64))
                writers[limits.names[side]].extend(ids[:count], lengths)
                ids = ids[count:]
        return {name: writer.close() for name, writer in writers.items()}


def _runs(side: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first, behind last, value) of each run of equal values: whole runs need no copy of ids."""
    if not len(side):
        return
    edges = [0, *(np.flatnonzero(np.diff(side)) + 1).tolist(), len(side)]
    for first, last in zip(edges, edges[1:], strict=False):
        yield first, last, int(side[first])


class Merging:
    """`write_splits`, on a thread, while the parts are still being made.

    A context manager: leaving it without `result` gives up what was written.
    """

    def __init__(self, write: Callable[[Iterable[Part]], dict[str, ShardInfo]]):
        """`write` is given the parts in their order, as they come."""
        self._coming = SimpleQueue[Part | Exception | None]()
        self._early: dict[int, Part] = {}
        self._next = 0
        self._thread = ThreadPoolExecutor(1)
        self._splits = self._thread.submit(write, iter(self._take, None))

    def _take(self) -> Part | None:
        part = self._coming.get()
        if isinstance(part, Exception):
            raise part
        return part

    def add(self, part: Part) -> None:
        """One more is finished, in any order. Raises what writing raised so far."""
        self._early[part.number] = part
        while self._next in self._early:
            self._coming.put(self._early.pop(self._next))
            self._next += 1
        if self._splits.done():
            self._splits.result()

    def result(self) -> dict[str, ShardInfo]:
        """The splits, when there are no more parts. Raises DataError, OSError."""
        self._coming.put(None)
        return self._splits.result()

    def __enter__(self) -> Merging:
        return self

    def __exit__(self, *_: object) -> None:
        self._coming.put(DataError("given up"))
        self._thread.shutdown()
