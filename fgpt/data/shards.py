"""Token shards in Megatron's indexed format: NAME.bin (ids) and NAME.idx (index.py).

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
from fgpt.utils.files import sha256_file

SAMPLED_BLOCKS = 256
BLOCK_BYTES = 2**14


@dataclass(frozen=True)
class ShardInfo:
    """What a finished shard holds; part of the data card."""

    documents: int
    """Number of documents."""
    tokens: int
    """Number of tokens, end-of-document ids included."""
    max_id: int
    """Largest token id."""
    bin_bytes: int
    """Size of .bin, in bytes."""
    bin_sha256: str
    """SHA-256 of .bin."""
    bin_sampled_sha256: str
    """SHA-256 of blocks all over .bin (`sampled_sha256`): compared at every start."""
    idx_bytes: int
    """Size of .idx, in bytes."""
    idx_sha256: str
    """SHA-256 of .idx."""


def sampled_sha256(path: Path) -> str:
    """SHA-256 of SAMPLED_BLOCKS blocks spread over a file, its first and last bytes included.

    Of a file of up to 4 MiB, that is all of it. Reading them takes milliseconds at any size.
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


def check_range(ids: np.ndarray, vocab_size: int, where: str) -> int:
    """Largest of the ids, -1 if there are none. Raises DataError for one out of range."""
    if ids.size == 0:
        return -1
    low, high = 0 if ids.dtype.kind == "u" else int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise DataError(f"{where}: id {low if low < 0 else high} is outside 0..{vocab_size - 1}")
    return high


class IndexedTokens:
    """One shard, memory-mapped after everything about it was checked.

    `lengths` int32 [S], `pointers` int64 [S] (bytes) and `documents` int64 [D] are the index's
    arrays.
    """

    def __init__(self, prefix: str | Path, vocab_size: int | None = None):
        """Open PREFIX.bin and PREFIX.idx. Raises DataError naming file, field and values.

        `vocab_size`: every id that is read is to be below; None: any id is read.
        """
        self._vocab_size = vocab_size
        self.path = with_suffix(Path(prefix), ".bin")
        """The .bin file."""
        self._index_path = with_suffix(Path(prefix), ".idx")
        self._index = index = read_index(self._index_path)
        self.dtype, self.lengths, self.pointers = index.dtype, index.lengths, index.pointers
        self.documents = index.documents
        self.tokens = index.tokens
        """Number of tokens."""
        self._bytes = self.tokens * self.dtype.itemsize
        self.check_size()
        if self.tokens == 0:
            raise DataError(f"{self.path}: holds no tokens; prepare the data set again")
        with self.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), self._bytes, access=mmap.ACCESS_READ)
        # samples lie all over the file: reading ahead would fetch 32 pages for the one that is used
        mapped.madvise(mmap.MADV_RANDOM)
        self._map = np.frombuffer(mapped, self.dtype)

    def check_size(self) -> None:
        """Raise DataError if .bin or .idx is not as long as it was at opening.

        Before each read: a file cut short under a memory map would kill us with SIGBUS.
        """
        for path, wanted in ((self.path, self._bytes), (self._index_path, self._index.size_bytes)):
            try:
                actual = os.stat(path).st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            if actual != wanted:
                what = f"is {actual} bytes, but its .idx says {wanted} ({self.tokens} tokens)"
                raise DataError(f"{path}: {what}; prepare the data set again")

    @property
    def document_count(self) -> int:
        """Number of documents."""
        return len(self.documents) - 1

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens [start, start + length) for each start, int64 [len(starts), length]."""
        lengths = np.full(len(starts), length, dtype=np.int64)
        return self.pieces(starts, lengths).reshape(len(starts), length)

    def pieces(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Tokens [start, start + length) for each start and length, end to end: int64 [their sum].

        Raises DataError out of range, for an id that is none of the vocabulary's, or if .bin is not
        what it was at opening.
        """
        self.check_size()
        stops = starts + lengths
        if len(starts) and not (starts.min() >= 0 and stops.max() <= self.tokens):
            what = f"window {starts.min()}..{stops.max()} of {self.tokens} tokens"
            raise DataError(f"{self.path}: {what} is out of range")
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        place = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            out[place : place + stop - start] = self._map[start:stop]
            place += stop - start
        if self._vocab_size is not None:
            check_range(out, self._vocab_size, str(self.path))
        return out

    def document(self, i: int) -> np.ndarray:
        """Ids of document `i`, int64 [its length]. Raises DataError if there is none."""
        if not 0 <= i < self.document_count:
            raise DataError(f"{self.path}: no document {i}; it has {self.document_count}")
        self.check_size()
        first, last = int(self.documents[i]), int(self.documents[i + 1])
        if first == last:
            return np.empty(0, dtype=np.int64)
        start = int(self.pointers[first]) // self.dtype.itemsize
        length = int(self.lengths[first:last].sum(dtype=np.int64))
        return self.windows(np.array([start]), length)[0]


def with_suffix(prefix: Path, suffix: str) -> Path:
    """PREFIX + suffix; the prefix may have dots of its own."""
    return prefix.with_name(prefix.name + suffix)


def check_bin(prefix: Path, info: ShardInfo, whole: bool) -> None:
    """Compare PREFIX.bin with its hash, all of it or the sampled blocks. Raises DataError."""
    path = with_suffix(prefix, ".bin")
    try:
        found = sha256_file(path) if whole else sampled_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    wanted = info.bin_sha256 if whole else info.bin_sampled_sha256
    if found != wanted:
        what = f"SHA-256 {found[:12]}..., but the card says {wanted[:12]}..."
        raise DataError(f"{path}: {what}; prepare the data set again")
