"""Files -> spans that can be read apart from each other: the unit of parallel work.

A .jsonl file, and a text file that holds several documents, is cut behind the first line (or
separator) end after every SPAN_BYTES; a .parquet file between row groups; a file that is one
document or is compressed stays whole. Where a file is cut depends on nothing but the file.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from fgpt.errors import DataError

SPAN_BYTES = 2**24
CHUNK_BYTES = 2**20

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


class Span(NamedTuple):
    """Part of a file: bytes [start, end), or row groups [start, end) of a .parquet file."""

    path: str
    """The file; text, for there may be millions."""
    source: str
    """Its name in messages."""
    start: int
    """Where the span begins."""
    end: int
    """Where it ends; of a compressed file, 0: it is read to its end."""
    size_bytes: int
    """Size of the span on disk."""
    stamp: tuple[int, int]
    """Size in bytes and modification time in ns of the file when it was listed."""


def file_stamp(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns; (-1, 0) of a file that cannot be read."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return (-1, 0)


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def check_unchanged(span: Span) -> None:
    """Raise DataError if the file is not the one that was listed."""
    if file_stamp(span.path) != span.stamp:
        raise _changed(span)


def _changed(span: Span) -> DataError:
    return DataError(f"{span.path}: changed while the corpus was read; run again")


def read_bytes(span: Span) -> bytes:
    """All bytes of an uncompressed file, in four system calls: there may be millions of files.

    Raises OSError; DataError if what was opened is not the file that was listed.
    """
    handle = os.open(span.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for ever
    try:
        data = os.read(handle, span.end + 1)
        while len(data) < span.end and (more := os.read(handle, span.end + 1 - len(data))):
            data += more
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise _not_a_file()
        if _stamp(found) != span.stamp or len(data) > span.end:
            raise _changed(span)
        return data
    finally:
        os.close(handle)


def _not_a_file() -> OSError:
    return OSError(errno.EINVAL, "not a regular file")


def inner_suffix(path: str) -> str:
    """The suffix that says what a file holds: .jsonl of a.jsonl.gz."""
    stem, suffix = _split(path)
    return _split(stem)[1] if suffix in COMPRESSIONS else suffix


def _split(path: str) -> tuple[str, str]:
    """As os.path.splitext, but the suffix in lower case, and in a third of its time."""
    stem, dot, last = path.rpartition(".")
    if stem.endswith("/") or not stem or "/" in last:
        return path, ""
    return stem, dot + last.lower()


def is_compressed(path: str) -> bool:
    """Whether the file's name says that it is compressed."""
    return path.lower().endswith(tuple(COMPRESSIONS))


def open_binary(path: str) -> io.BufferedReader:
    """The file's bytes, decompressed. Raises OSError, while reading, for a damaged archive."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise _not_a_file()
    if not is_compressed(path):
        return open(path, "rb")
    import pyarrow as pa

    kind = COMPRESSIONS[os.path.splitext(path.lower())[1]]
    stream = pa.input_stream(path, compression=kind)
    return io.BufferedReader(stream, CHUNK_BYTES)


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    """What matches a separator; the file's line ends may be CRLF where the separator says LF.

    Not so at its beginning, where the CR is left to the caller: a pattern that begins with a fixed
    byte is found many times as fast.
    """
    first, rest = separator[:1].encode(), separator[1:].encode()
    return re.compile(re.escape(first) + re.escape(rest).replace(b"\\\n", b"\r?\n"))


def whole_file(path: str, source: str) -> Span:
    """All of an uncompressed file; of one that cannot be read, no bytes."""
    stamp = file_stamp(path)
    size = max(0, stamp[0])
    return Span(path, source, 0, size, size, stamp)


def spans_of(path: str, source: str, pattern: re.Pattern[bytes] | None) -> list[Span]:
    """The spans of one file; `pattern` matches what ends a document, None: it is one document."""
    whole = whole_file(path, source)
    stamp, size = whole.stamp, whole.size_bytes
    if is_compressed(path):
        return [whole._replace(end=0)]
    if inner_suffix(path) == ".parquet":
        return _row_groups(path, source, stamp)
    edges = [0, *_edges(path, size, pattern), size]
    pairs = zip(edges, edges[1:], strict=False)
    return [Span(path, source, start, end, end - start, stamp) for start, end in pairs]


def _edges(path: str, size: int, pattern: re.Pattern[bytes] | None) -> Iterator[int]:
    """Where documents begin, at least SPAN_BYTES apart; not 0 and not `size`."""
    if pattern is None or size <= SPAN_BYTES:
        return
    with open(path, "rb") as file:
        at = SPAN_BYTES
        while at < size:
            edge = _behind_next(file, at, pattern)
            if edge is None or edge >= size:
                return
            yield edge
            at = edge + SPAN_BYTES


def _behind_next(file: BinaryIO, at: int, pattern: re.Pattern[bytes]) -> int | None:
    """Where the first match that begins at byte `at` or later ends."""
    file.seek(at)
    held = b""
    overlap = 2 * len(pattern.pattern)
    while chunk := file.read(CHUNK_BYTES):
        held += chunk
        match = pattern.search(held)
        if match:
            return at + match.end()
        at += max(0, len(held) - overlap)
        held = held[-overlap:]
    return None


def _row_groups(path: str, source: str, stamp: tuple[int, int]) -> list[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    spans: list[Span] = []
    try:
        with pq.ParquetFile(path) as file:
            start, held = 0, 0
            for group in range(file.num_row_groups):
                held += file.metadata.row_group(group).total_byte_size
                if held >= SPAN_BYTES or group == file.num_row_groups - 1:
                    spans.append(Span(path, source, start, group + 1, held, stamp))
                    start, held = group + 1, 0
    except (pa.ArrowException, OSError):
        return [Span(path, source, 0, 1, max(0, stamp[0]), stamp)]  # its reader says what is wrong
    return spans


def lines_before(path: str, offset: int) -> int:
    """Number of line ends in the first `offset` bytes, for a message."""
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK_BYTES, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count
