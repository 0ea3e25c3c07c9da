"""Splitting a text file at a separator, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from fgpt.prepare.sources import spans
from fgpt.prepare.sources.decode import BOM
from fgpt.prepare.sources.spans import Span, separator_pattern

CR = ord("\r")


class SplitDocuments(NamedTuple):
    """Consecutive documents of a file, unchecked."""

    offset: int  # of the first one, in bytes
    texts: list[bytes]
    gap: int  # bytes between each two of them; 0: a single document


class DocumentSplitter:
    """Splits one span; holds one document and one chunk in memory.

    1. Append a chunk to the buffer, and search from where a separator cut by the last chunk's end
       may begin.
    2. If the buffer holds neither CRLF nor BOM, split all of it at once; else match by match.
    3. What follows the last separator stays in the buffer. If it is longer than `limit`, it is a
       document that is too long: its beginning is kept in `_oversized` and its rest is discarded.
    """

    def __init__(self, separator: str, span: Span, limit: int):
        """A document of more than `limit` bytes is truncated, to more than `limit` bytes."""
        self._separator, self._pattern = separator.encode(), separator_pattern(separator)
        # each LF of the separator may be CRLF in the file
        self._overlap, self._begins_with_lf = 2 * len(self._separator), separator.startswith("\n")
        self._offset, self._limit = span.start, limit
        self._remaining = span.end - span.start if span.end else None
        self._buffer, self._searched = b"", 0
        self._oversized = b""

    def split(self, file: BinaryIO) -> Iterator[SplitDocuments]:
        """Yield the documents from the file's position to the span's end."""
        while chunk := file.read(self._chunk_bytes()):
            self._remaining = None if self._remaining is None else self._remaining - len(chunk)
            self._buffer += chunk
            match = self._pattern.search(self._buffer, max(0, self._searched - self._overlap))
            if match and self._is_plain():
                yield self._split_at_once()
            elif match:
                yield from self._split_by_match(match.start())
            self._discard_oversized()
            self._searched = len(self._buffer)
        yield self._single(self._offset, self._oversized or self._buffer)

    def _chunk_bytes(self) -> int:
        if self._remaining is None:
            return spans.CHUNK_BYTES
        return min(spans.CHUNK_BYTES, self._remaining)

    def _is_plain(self) -> bool:
        """Return whether bytes.split gives the documents: no CRLF, no BOM, none too long."""
        is_short = len(self._buffer) <= self._limit and not self._oversized
        has_bom = self._offset == 0 and self._buffer.startswith(BOM)
        return is_short and not has_bom and b"\r" not in self._buffer

    def _split_at_once(self) -> SplitDocuments:
        *texts, rest = self._buffer.split(self._separator)
        offset = self._offset
        self._offset += len(self._buffer) - len(rest)
        self._buffer = rest
        return SplitDocuments(offset, texts, len(self._separator))

    def _split_by_match(self, first: int) -> Iterator[SplitDocuments]:
        start, buffer, offset = 0, self._buffer, self._offset
        for match in self._pattern.finditer(buffer, first):
            end = match.start()
            if self._begins_with_lf and end > start and buffer[end - 1] == CR:
                end -= 1  # the CR belongs to the separator
            yield self._single(offset + start, self._oversized or buffer[start:end])
            start, self._oversized = match.end(), b""
        self._buffer, self._offset = buffer[start:], offset + start

    def _discard_oversized(self) -> None:
        if len(self._buffer) > self._limit:
            self._oversized = self._oversized or self._buffer
            self._offset += len(self._buffer) - self._overlap
            self._buffer = self._buffer[-self._overlap :]

    @staticmethod
    def _single(offset: int, raw: bytes) -> SplitDocuments:
        offset, raw = remove_bom(offset, raw)
        return SplitDocuments(offset, [raw], 0)


def remove_bom(offset: int, raw: bytes) -> tuple[int, bytes]:
    """Remove the byte order mark of bytes at the beginning of a file; returns (offset, bytes)."""
    if offset == 0 and raw.startswith(BOM):
        return len(BOM), raw[len(BOM) :]
    return offset, raw
