"""Spans of files: pieces that can be read independently.

Files with several documents are divided after the first end of a line (.jsonl) or a separator
(text) behind every SPAN_BYTES, .parquet files between row groups. Files that are one document or
compressed are one span. The division depends only on the file.
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
    """A range of a file: bytes [start, end), or row groups [start, end) of a .parquet file."""

    path: str  # not a Path: there may be millions
    source: str  # name in messages
    start: int
    end: int  # 0 for a compressed file, which is read to its end
    size_bytes: int  # on disk
    stamp: tuple[int, int]  # `file_stamp` when the file was listed


def file_stamp(path: str) -> tuple[int, int]:
    """Return size in bytes and modification time in ns; (-1, 0) if the file cannot be read."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return (-1, 0)


def _stamp(result: os.stat_result) -> tuple[int, int]:
    return result.st_size, result.st_mtime_ns


def check_unchanged(span: Span) -> None:
    """Raise DataError if the file changed since it was listed."""
    if file_stamp(span.path) != span.stamp:
        raise _changed(span)


def _changed(span: Span) -> DataError:
    return DataError(f"{span.path}: changed while the corpus was read; run again")


def _not_a_file() -> OSError:
    return OSError(errno.EINVAL, "not a regular file")


def read_whole_file(span: Span) -> bytes:
    """Read an uncompressed file in four system calls: there may be millions of files.

    Raises OSError; DataError if the file changed since it was listed.
    """
    descriptor = os.open(span.path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would block
    try:
        data = os.read(descriptor, span.end + 1)
        while len(data) < span.end and (more := os.read(descriptor, span.end + 1 - len(data))):
            data += more
        result = os.fstat(descriptor)
        if not stat.S_ISREG(result.st_mode):
            raise _not_a_file()
        if _stamp(result) != span.stamp or len(data) > span.end:
            raise _changed(span)
        return data
    finally:
        os.close(descriptor)


def inner_suffix(path: str) -> str:
    """Return the suffix of the decompressed file, in lower case: .jsonl for a.jsonl.gz."""
    stem, suffix = _split_suffix(path)
    return _split_suffix(stem)[1] if suffix in COMPRESSIONS else suffix


def _split_suffix(path: str) -> tuple[str, str]:
    """os.path.splitext with the suffix in lower case, in a third of its time."""
    stem, dot, last = path.rpartition(".")
    if stem.endswith("/") or not stem or "/" in last:
        return path, ""
    return stem, dot + last.lower()


def is_compressed(path: str) -> bool:
    """Return whether the file is compressed, by its name."""
    return path.lower().endswith(tuple(COMPRESSIONS))


def open_binary(path: str) -> io.BufferedReader:
    """Open a file for reading, decompressed. Reading raises OSError for a damaged archive."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would block
        raise _not_a_file()
    if not is_compressed(path):
        return open(path, "rb")
    import pyarrow as pa

    kind = COMPRESSIONS[os.path.splitext(path.lower())[1]]
    return io.BufferedReader(pa.input_stream(path, compression=kind), CHUNK_BYTES)


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    """Return a pattern for a separator that matches CRLF in the file for LF in the separator.

    Except for a leading LF, whose CR the caller must check: patterns that begin with a literal byte
    are found many times as fast.
    """
    first, rest = separator[:1].encode(), separator[1:].encode()
    return re.compile(re.escape(first) + re.escape(rest).replace(b"\\\n", b"\r?\n"))


def whole_file(path: str, source: str) -> Span:
    """Return the span of an uncompressed file; it is empty if the file cannot be read."""
    stamp = file_stamp(path)
    size = max(0, stamp[0])
    return Span(path, source, 0, size, size, stamp)


def spans_of(path: str, source: str, pattern: re.Pattern[bytes] | None) -> list[Span]:
    """Divide one file; `pattern` matches the end of a document, None: the file is one document."""
    whole = whole_file(path, source)
    if is_compressed(path):
        return [whole._replace(end=0)]
    if inner_suffix(path) == ".parquet":
        return _row_group_spans(whole)
    edges = [0, *_document_starts(path, whole.end, pattern), whole.end]
    pairs = zip(edges, edges[1:], strict=False)
    return [whole._replace(start=a, end=b, size_bytes=b - a) for a, b in pairs]


def _document_starts(path: str, size: int, pattern: re.Pattern[bytes] | None) -> Iterator[int]:
    """Yield offsets inside the file where documents begin, at least SPAN_BYTES apart."""
    if pattern is None or size <= SPAN_BYTES:
        return
    with open(path, "rb") as file:
        at = SPAN_BYTES
        while at < size:
            start = _end_of_match(file, at, pattern)
            if start is None or start >= size:
                return
            yield start
            at = start + SPAN_BYTES


def _end_of_match(file: BinaryIO, at: int, pattern: re.Pattern[bytes]) -> int | None:
    """Return the end of the first match that begins at byte `at` or later."""
    file.seek(at)
    buffer = b""
    overlap = 2 * len(pattern.pattern)
    while chunk := file.read(CHUNK_BYTES):
        # 1. search the chunk together with the end of the previous one
        buffer += chunk
        match = pattern.search(buffer)
        if match:
            return at + match.end()
        # 2. keep as much as a match cut by the chunk's end can have
        at += max(0, len(buffer) - overlap)
        buffer = buffer[-overlap:]
    return None


def _row_group_spans(whole: Span) -> list[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    spans: list[Span] = []
    try:
        with pq.ParquetFile(whole.path) as file:
            start, size = 0, 0
            for group in range(file.num_row_groups):
                size += file.metadata.row_group(group).total_byte_size
                if size >= SPAN_BYTES or group == file.num_row_groups - 1:
                    spans.append(whole._replace(start=start, end=group + 1, size_bytes=size))
                    start, size = group + 1, 0
    except (pa.ArrowException, OSError):
        return [whole._replace(end=1)]  # the reader will report the error
    return spans


def count_lines(path: str, offset: int) -> int:
    """Return the number of line ends in the first `offset` bytes of a file."""
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (chunk := file.read(min(CHUNK_BYTES, offset))):
            count += chunk.count(b"\n")
            offset -= len(chunk)
    return count
