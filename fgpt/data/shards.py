"""Token shards in Megatron's indexed format, version 1: NAME.bin and NAME.idx.

    .bin   the ids of all sequences, end to end, little-endian uint16 or int32
    .idx   9 bytes  magic "MMIDIDX\\0\\0"
           uint64   version, 1
           uint8    dtype code: 8 uint16, 4 int32
           uint64   S, number of sequences
           uint64   D, number of entries of the document index (documents + 1)
           int32[S] length of each sequence, in tokens
           int64[S] where each sequence begins in .bin, in bytes
           int64[D] first sequence of each document; the last entry is S

FGPT writes one sequence per document. Source of the layout: Megatron-LM,
`megatron/core/datasets/indexed_dataset.py`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from fgpt.data.files import write_durably
from fgpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES: dict[int, np.dtype] = {8: np.dtype("<u2"), 4: np.dtype("<i4")}
CODES = {dtype: code for code, dtype in DTYPES.items()}


def dtype_for(vocab_size: int) -> np.dtype:
    """Smallest dtype of the format that holds every id below `vocab_size`."""
    return DTYPES[8] if vocab_size <= 2**16 else DTYPES[4]


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
    idx_bytes: int
    """Size of .idx, in bytes."""
    idx_sha256: str
    """SHA-256 of .idx."""


class ShardWriter:
    """Streams documents into PREFIX.bin and PREFIX.idx; memory: 4 bytes per document (24 to close).

    Neither file is there under its name before `close`; leaving the `with` block by an exception
    removes what was written.
    """

    def __init__(self, prefix: Path, vocab_size: int):
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = dtype_for(vocab_size)
        self._lengths = array("i")
        self._max_id = -1
        self._tokens = 0
        self._hash = hashlib.sha256()
        self._tmp = _with_suffix(prefix, ".bin.tmp")
        self._file = self._tmp.open("wb")

    def add(self, ids: np.ndarray) -> None:
        """Append one document, ids int [n], n >= 1. Raises DataError for an id out of range."""
        if ids.size == 0:
            raise DataError(f"{self._prefix}: a document without tokens; end it with the eod id")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise DataError(f"{self._prefix}: id {bad} is outside 0..{self._vocab_size - 1}")
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self._lengths.append(ids.size)
        self._tokens += ids.size
        self._max_id = max(self._max_id, high)

    def close(self) -> ShardInfo:
        """Make both files durable under their names and say what they hold."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        index = self._index()
        self._tmp.replace(_with_suffix(self._prefix, ".bin"))
        write_durably(_with_suffix(self._prefix, ".idx"), index)
        return ShardInfo(
            documents=len(self._lengths),
            tokens=self._tokens,
            max_id=self._max_id,
            bin_bytes=self._tokens * self._dtype.itemsize,
            bin_sha256=self._hash.hexdigest(),
            idx_bytes=len(index),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def _index(self) -> bytes:
        lengths = np.frombuffer(self._lengths, dtype="<i4") if self._lengths else np.zeros(0, "<i4")
        count = len(lengths)
        documents = np.arange(count + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, CODES[self._dtype], count, len(documents))
        pointers = _pointers(lengths, self._dtype)
        return b"".join((header, lengths.tobytes(), pointers.tobytes(), documents.tobytes()))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._tmp.unlink(missing_ok=True)


class IndexedTokens:
    """One shard, memory-mapped after everything about it was checked.

    `lengths` int32 [S], `pointers` int64 [S] (bytes) and `documents` int64 [D] are the index's arrays.
    """

    def __init__(self, prefix: str | Path):
        """Open PREFIX.bin and PREFIX.idx. Raises DataError naming file, field and values."""
        self.path = _with_suffix(Path(prefix), ".bin")
        """The .bin file."""
        index = _read_index(_with_suffix(Path(prefix), ".idx"))
        self.dtype, self.lengths, self.pointers, self.documents = index
        self.tokens = int(self.lengths.sum(dtype=np.int64))
        """Number of tokens."""
        self._bytes = self.tokens * self.dtype.itemsize
        self._check_size()
        if self.tokens == 0:
            raise DataError(f"{self.path}: holds no tokens; prepare the data set again")
        mapped = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))
        self._map = mapped.view(np.ndarray)  # slicing the subclass costs ten times as much

    def _check_size(self) -> None:
        # Also before each read: a file cut short under a memory map would kill us with SIGBUS.
        try:
            actual = self.path.stat().st_size
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error
        if actual != self._bytes:
            what = f"is {actual} bytes, but its .idx says {self._bytes} ({self.tokens} tokens)"
            raise DataError(f"{self.path}: {what}; prepare the data set again")

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

        Raises DataError out of range, or if .bin is not what it was at opening.
        """
        self._check_size()
        stops = starts + lengths
        if len(starts) and not (starts.min() >= 0 and stops.max() <= self.tokens):
            what = f"window {starts.min()}..{stops.max()} of {self.tokens} tokens"
            raise DataError(f"{self.path}: {what} is out of range")
        out = np.empty(int(lengths.sum()), dtype=np.int64)
        place = 0
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            out[place : place + stop - start] = self._map[start:stop]
            place += stop - start
        return out

    def document(self, i: int) -> np.ndarray:
        """Ids of document `i`, int64 [its length]. Raises DataError if there is none."""
        if not 0 <= i < self.document_count:
            raise DataError(f"{self.path}: no document {i}; it has {self.document_count}")
        first, last = self.documents[i], self.documents[i + 1]
        start = int(self.lengths[:first].sum(dtype=np.int64))
        length = int(self.lengths[first:last].sum(dtype=np.int64))
        return self.windows(np.array([start]), length)[0]


def _with_suffix(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)


def _pointers(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    ends = np.cumsum(lengths, dtype="<i8") * dtype.itemsize
    return np.concatenate((np.zeros(min(1, len(ends)), "<i8"), ends[:-1]))


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """(dtype, lengths int32 [S], pointers int64 [S], documents int64 [D]), every field checked."""

    def bad(what: str) -> DataError:
        return DataError(f"{path}: {what}; prepare the data set again")

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) < HEADER.size:
        raise bad(f"truncated: {len(raw)} bytes, the header alone has {HEADER.size}")
    magic, version, code, sequences, entries = HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise bad(f"magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise bad(f"version is {version}; version {VERSION} is read")
    if code not in DTYPES:
        raise bad(f"dtype code is {code}; 8 (uint16) and 4 (int32) are read")
    size = HEADER.size + 12 * sequences + 8 * entries
    if len(raw) != size:
        what = f"{sequences} sequences and {entries} document entries need {size} bytes"
        raise bad(f"{what}, the file has {len(raw)}")
    lengths = np.frombuffer(raw, "<i4", sequences, HEADER.size)
    pointers = np.frombuffer(raw, "<i8", sequences, HEADER.size + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", entries, HEADER.size + 12 * sequences)
    if sequences and lengths.min() < 0:
        raise bad(f"length of sequence {int(lengths.argmin())} is {lengths.min()}")
    wrong = np.flatnonzero(pointers != _pointers(lengths, DTYPES[code]))
    if len(wrong):
        i = int(wrong[0])
        expected = _pointers(lengths, DTYPES[code])[i]
        raise bad(f"pointer of sequence {i} is {pointers[i]}, its place is {expected}")
    ends_right = entries > 0 and documents[0] == 0 and documents[-1] == sequences
    if not ends_right or (np.diff(documents) < 0).any():
        raise bad(f"document index does not rise from 0 to {sequences}")
    return DTYPES[code], lengths, pointers, documents
