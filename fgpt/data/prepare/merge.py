"""Parts, in their order -> the splits of a data set.

A document is validation if its split key is below the first limit, test if below the second, else
training; so which split it is in depends on its text and the seed alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from fgpt.data.prepare.parts import Part, read_ids, read_table
from fgpt.data.shard_writer import ShardWriter
from fgpt.data.shards import ShardInfo
from fgpt.data.split import Limits
from fgpt.errors import DataError


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
    folder: Path, parts: Sequence[Part], limits: Limits, vocab_size: int, out: Path
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
