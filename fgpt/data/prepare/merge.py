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
from fgpt.data.shards import ShardInfo, ShardWriter
from fgpt.data.split import Limits


def source_digest(folder: Path, parts: Sequence[Part]) -> str:
    """SHA-256 over the documents' SHA-256s, in reading order."""
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
            side = limits.side(table["key"])
            for number, name in enumerate(limits.names):
                chosen = side == number
                if chosen.all():
                    writers[name].extend(ids, table["tokens"])
                elif chosen.any():
                    of_tokens = np.repeat(chosen, table["tokens"])
                    writers[name].extend(ids[of_tokens], table["tokens"][chosen])
        return {name: writer.close() for name, writer in writers.items()}
