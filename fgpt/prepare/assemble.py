"""Parts, in the order of the corpus -> the splits of a data set and its card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

import numpy as np

import fgpt
from fgpt.data.card import FORMAT, DataCard, SourceCard, TokenizerCard
from fgpt.data.index import dtype_for
from fgpt.data.recipe import Recipe
from fgpt.data.shards import ShardInfo
from fgpt.errors import DataError
from fgpt.prepare.parts import ShardPart, iter_tables, read_ids, read_table
from fgpt.prepare.shard_writer import ShardWriter
from fgpt.prepare.sources.corpus import ReadStats
from fgpt.prepare.split import SplitBoundaries
from fgpt.tokenizer.base import Tokenizer

LIBRARIES = ("numpy", "tokenizers", "sentencepiece")


def source_digest(parts_dir: Path, parts: Sequence[ShardPart]) -> str:
    """Return the SHA-256 over the documents' hashes (`split.text_hash`), in reading order."""
    digest = hashlib.sha256()
    for table in iter_tables(parts_dir, parts):
        digest.update(table["digest"].tobytes())
    return digest.hexdigest()


def write_splits(
    parts_dir: Path,
    parts: Iterable[ShardPart],
    boundaries: SplitBoundaries,
    vocab_size: int,
    out: Path,
) -> dict[str, ShardInfo]:
    """Write OUT/train, OUT/valid and OUT/test, if `boundaries` has a test split."""
    with ExitStack() as stack:
        writers = {
            name: stack.enter_context(ShardWriter(out / name, vocab_size))
            for name in boundaries.names
        }
        for part in parts:
            table = read_table(parts_dir, part)
            ids = read_ids(parts_dir, part, writers["train"].dtype)
            if len(ids) != table["tokens"].sum(dtype=np.int64):
                raise DataError(
                    f"{parts_dir}: part {part.number} is damaged; remove it and run again"
                )
            for first, stop, split in _runs(boundaries.assign(table["key"])):
                lengths = table["tokens"][first:stop]
                count = int(lengths.sum(dtype=np.int64))
                writers[boundaries.names[split]].extend(ids[:count], lengths)
                ids = ids[count:]
        return {name: writer.close() for name, writer in writers.items()}


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield (first, stop, value) of each run of equal values: ids of a run are not copied."""
    if not len(values):
        return
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, stop in zip(edges, edges[1:], strict=False):
        yield first, stop, int(values[first])


class SplitWriterThread:
    """Writes splits on a thread while parts are still being made.

    1. `add` accepts parts in any order, and queues each as soon as all earlier ones are queued.
    2. `write`, on the thread, consumes the queue in order.
    3. `result` ends the queue and returns the splits; leaving the context without it makes `write`
       raise, so that it removes its files.
    """

    def __init__(self, write: Callable[[Iterable[ShardPart]], dict[str, ShardInfo]]):
        self._queue = SimpleQueue[ShardPart | Exception | None]()
        self._early: dict[int, ShardPart] = {}
        self._next = 0
        self._thread = ThreadPoolExecutor(1)
        self._splits = self._thread.submit(write, iter(self._take, None))

    def _take(self) -> ShardPart | None:
        part = self._queue.get()
        if isinstance(part, Exception):
            raise part
        return part

    def add(self, part: ShardPart) -> None:
        """Add a finished part. Raises the error of `write`, if it failed."""
        self._early[part.number] = part
        while self._next in self._early:
            self._queue.put(self._early.pop(self._next))
            self._next += 1
        if self._splits.done():
            self._splits.result()

    def result(self) -> dict[str, ShardInfo]:
        """Return the splits, after the last part was added. Raises DataError, OSError."""
        self._queue.put(None)
        return self._splits.result()

    def __enter__(self) -> SplitWriterThread:
        return self

    def __exit__(self, *_: object) -> None:
        self._queue.put(DataError("preparation was aborted"))
        self._thread.shutdown()


def make_card(
    recipe: Recipe,
    files: int,
    stats: ReadStats,
    source_sha256: str,
    tokenizer: Tokenizer,
    splits: Mapping[str, ShardInfo],
) -> DataCard:
    """Return the card of a data set whose splits were just written."""
    tokens = sum(info.tokens for info in splits.values())
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return DataCard(
        format=FORMAT,
        recipe=recipe,
        recipe_sha256=recipe.digest(),
        source=SourceCard(
            files=files,
            documents=stats.documents,
            bytes=stats.bytes,
            sha256=source_sha256,
            empty=stats.empty,
            flawed=stats.flawed,
            flaws=tuple(stats.flaws),
        ),
        tokenizer=TokenizerCard(tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod_id),
        dtype=dtype_for(tokenizer.vocab_size).name,
        bytes_per_token=round(stats.bytes / tokens, 4),
        train=splits["train"],
        valid=splits["valid"],
        test=splits.get("test"),
        versions={"fgpt": fgpt.__version__, "python": platform.python_version(), **versions},
    )
