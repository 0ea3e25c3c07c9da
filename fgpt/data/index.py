"""Megatron's index of a token shard, version 1: PREFIX.idx.

    9 bytes  magic "MMIDIDX\\0\\0"
    uint64   version, 1
    uint8    dtype code: 1 uint8, 3 int16, 4 int32, 5 int64, 8 uint16
    uint64   S, number of sequences
    uint64   D, number of entries of the document index (documents + 1)
    int32[S] length of each sequence, in tokens
    int64[S] where each sequence begins in .bin, in bytes
    int64[D] first sequence of each document; the last entry is S

FGPT writes uint16 or int32 and one sequence per document; it reads all of the above. Source of the
layout: Megatron-LM, `megatron/core/datasets/indexed_dataset.py`; GPT-NeoX writes the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in ((1, "u1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2"))
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHECKED_AT_ONCE = 2**20


def dtype_for(vocab_size: int) -> np.dtype:
    """Smallest dtype that FGPT writes and that holds every id below `vocab_size`."""
    return DTYPES[8] if vocab_size <= 2**16 else DTYPES[4]


@dataclass(frozen=True)
class Index:
    """An .idx whose every field was checked. The arrays are memory-mapped."""

    dtype: np.dtype
    """Type of the ids in .bin."""
    lengths: np.ndarray
    """int32 [S]: tokens of each sequence."""
    pointers: np.ndarray
    """int64 [S]: first byte of each sequence in .bin."""
    documents: np.ndarray
    """int64 [D]: first sequence of each document."""
    tokens: int
    """Sum of the lengths."""
    size_bytes: int
    """Size of the .idx."""


def read_index(path: Path) -> Index:
    """Map an .idx and check it. Raises DataError naming the field and its value.

    Takes about 10 ns a document, and no memory that grows with their number.
    """

    def bad(what: str) -> DataError:
        return DataError(f"{path}: {what}; prepare the data set again")

    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(HEADER.size)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if len(head) < HEADER.size:
        raise bad(f"truncated: {len(head)} bytes, the header alone has {HEADER.size}")
    magic, version, code, sequences, entries = HEADER.unpack(head)
    if magic != MAGIC:
        raise bad(f"magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise bad(f"version is {version}; version {VERSION} is read")
    if code not in DTYPES:
        known = ", ".join(f"{code} ({dtype.name})" for code, dtype in DTYPES.items())
        raise bad(f"dtype code is {code}; read are {known}")
    wanted = HEADER.size + 12 * sequences + 8 * entries
    if size != wanted:
        what = f"{sequences} sequences and {entries} document entries need {wanted} bytes"
        raise bad(f"{what}, the file has {size}")
    mapped = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    ends = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * entries])
    lengths = mapped[ends[0] : ends[1]].view("<i4")
    pointers = mapped[ends[1] : ends[2]].view("<i8")
    documents = mapped[ends[2] : ends[3]].view("<i8")
    fault, tokens = _sequence_fault(lengths, pointers, DTYPES[code].itemsize)
    fault = fault or _document_fault(documents, sequences)
    if fault:
        raise bad(fault)
    return Index(DTYPES[code], lengths, pointers, documents, tokens, size)


def _sequence_fault(
    lengths: np.ndarray, pointers: np.ndarray, itemsize: int
) -> tuple[str | None, int]:
    """(what is wrong with the sequences, number of tokens)."""
    tokens = 0
    for start in range(0, len(lengths), CHECKED_AT_ONCE):
        some = lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
        if some.min() < 0:
            i = int(some.argmin())
            return f"length of sequence {start + i} is {some[i]}", 0
        begins = (tokens + np.cumsum(some) - some) * itemsize
        found = pointers[start : start + CHECKED_AT_ONCE]
        wrong = np.flatnonzero(found != begins)
        if len(wrong):
            i = int(wrong[0])
            return f"pointer of sequence {start + i} is {found[i]}, its place is {begins[i]}", 0
        tokens += int(some.sum())
    return None, tokens


def _document_fault(documents: np.ndarray, sequences: int) -> str | None:
    what = f"document index does not rise from 0 to {sequences}"
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        return what
    for start in range(0, len(documents) - 1, CHECKED_AT_ONCE):
        some = documents[start : start + CHECKED_AT_ONCE + 1]
        if (some[1:] < some[:-1]).any():  # a difference could wrap around
            return what
    return None


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The bytes of an .idx with one sequence per document, in pieces; `lengths` int [S]."""
    count = len(lengths)
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype], count, count + 1)
    steps = range(0, count, CHECKED_AT_ONCE)
    for start in steps:
        yield lengths[start : start + CHECKED_AT_ONCE].astype("<i4").tobytes()
    tokens = 0
    for start in steps:
        some = lengths[start : start + CHECKED_AT_ONCE].astype(np.int64)
        yield ((tokens + np.cumsum(some) - some) * dtype.itemsize).astype("<i8").tobytes()
        tokens += int(some.sum())
    for start in range(0, count + 1, CHECKED_AT_ONCE):
        stop = min(start + CHECKED_AT_ONCE, count + 1)
        yield np.arange(start, stop, dtype="<i8").tobytes()


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> tuple[int, str]:
    """Write an .idx; (its size in bytes, its SHA-256). The caller makes it durable."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in index_bytes(lengths, dtype):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()
