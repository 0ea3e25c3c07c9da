"""Token shards in Megatron's indexed format: PREFIX.bin (token ids) and PREFIX.idx (index.py).

.bin holds the ids of all sequences, end to end, little-endian.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgpt.data.index import read_index
from fgpt.errors import DataError

SAMPLED_BLOCKS = 256
BLOCK_BYTES = 2**14


@dataclass(frozen=True)
class ShardInfo:
    """What a finished shard holds; part of the data card."""

    documents: int
    tokens: int  # end-of-document ids included
    max_id: int
    bin_bytes: int
    bin_sha256: str
    bin_sampled_sha256: str
    """`sampled_sha256` of .bin, which is compared whenever the data set is opened."""
    idx_bytes: int
    idx_sha256: str


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file's size and SAMPLED_BLOCKS evenly spaced blocks, first and last included.

    Takes milliseconds at any size, and covers all of a file of up to 4 MiB. Raises OSError.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    last = max(0, size - BLOCK_BYTES)
    starts = sorted({last * i // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)})
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def check_id_range(ids: np.ndarray, vocab_size: int, where: str) -> int:
    """Return the largest id, -1 if there are none. Raises DataError for an id out of range."""
    if ids.size == 0:
        return -1
    low, high = 0 if ids.dtype.kind == "u" else int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(f"{where}: id {low if low < 0 else high} is outside 0..{vocab_size - 1}")
    return high


def shard_path(prefix: Path, suffix: str) -> Path:
    """PREFIX + suffix; unlike Path.with_suffix, it keeps dots in the prefix."""
    return prefix.with_name(prefix.name + suffix)


class IndexedTokens:
    """One memory-mapped shard, opened after all of its index was checked.

    `lengths` int32 [S], `pointers` int64 [S] (bytes) and `documents` int64 [D] are the arrays of
    the index.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        """Open PREFIX.bin and PREFIX.idx. With `vocab_size`, each id read is checked against it.

        Raises DataError naming file, field and values.
        """
        self._vocab_size = vocab_size
        self.path = shard_path(Path(prefix), ".bin")
        self._index_path = shard_path(Path(prefix), ".idx")
        self._index = index = read_index(self._index_path)
        self.dtype, self.lengths, self.pointers = index.dtype, index.lengths, index.pointers
        self.documents = index.documents
        self.tokens = index.tokens
        self._bytes = self.tokens * self.dtype.itemsize
        self.check_size()
        if self.tokens == 0:
            raise DataError(f"{self.path}: holds no tokens; prepare the data set again")
        try:
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), self._bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        # Samples are read at random: readahead would fetch 32 pages for each page that is used.
        mapped.madvise(mmap.MADV_RANDOM)
        self._map = np.frombuffer(mapped, self.dtype)

    def check_size(self) -> None:
        """Raise DataError if .bin or .idx changed its size since opening.

        Called before each read: accessing a map beyond the end of a truncated file raises SIGBUS.
        """
        sizes = {self.path: self._bytes, self._index_path: self._index.size_bytes}
        for path, expected in sizes.items():
            try:
                actual = os.stat(path).st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            if actual != expected:
                size = f"{actual} bytes, expected {expected} for {self.tokens} tokens"
                raise DataError(f"{path}: is {size}; prepare the data set again")

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def read_ranges(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return tokens [start, start + length) of each range, end to end: int64 [sum of lengths].

        Raises DataError for a range or an id out of range, and if a file changed its size.
        """
        self.check_size()
        stops = starts + lengths
        if len(starts) and not (starts.min() >= 0 and stops.max() <= self.tokens):
            bounds = f"tokens {starts.min()}..{stops.max()} of {self.tokens}"
            raise DataError(f"{self.path}: {bounds} are out of range")
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        offset = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            out[offset : offset + stop - start] = self._map[start:stop]
            offset += stop - start
        if self._vocab_size is not None:
            check_id_range(out, self._vocab_size, str(self.path))
        return out

    def document(self, i: int) -> np.ndarray:
        """Return the ids of document `i`, int64 [its length]. Raises DataError if out of range."""
        if not 0 <= i < self.document_count:
            raise DataError(f"{self.path}: no document {i}; it has {self.document_count}")
        self.check_size()
        first, stop = int(self.documents[i]), int(self.documents[i + 1])
        if first == stop:
            return np.empty(0, dtype=np.int64)
        start = int(self.pointers[first]) // self.dtype.itemsize
        length = int(self.lengths[first:stop].sum(dtype=np.int64))
        return self.read_ranges(np.array([start]), np.array([length]))
