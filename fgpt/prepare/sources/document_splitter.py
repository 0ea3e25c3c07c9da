"""A text file with a separator -> its documents, those of a chunk all at once if it can be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from fgpt.prepare.sources import spans
from fgpt.prepare.sources.decode import BOM
from fgpt.prepare.sources.spans import Span, separator_pattern

CR = ord("\r")

Cut = tuple[int, list[bytes], int]
"""Byte offset, documents from there on, and bytes between each two of them: 0, it is one."""


class Cutter:
    """Cuts one span; holds one document and one chunk at a time."""

    def __init__(self, separator: str, span: Span, limit: int):
        """Of a document of more than `limit` bytes, some bytes more than that are yielded."""
        self._plain, self._pattern = separator.encode(), separator_pattern(separator)
        self._longest, self._is_line = 2 * len(self._plain), separator.startswith("\n")
        self._offset, self._limit = span.start, limit
        self._left = span.end - span.start if span.end else None
        self._held, self._searched = b"", 0
        self._begun = b""  # the beginning of a document that is too long; its rest is passed over

    def cut(self, file: BinaryIO) -> Iterator[Cut]:
        """Everything there is from the file's position on, to the span's end."""
        while chunk := file.read(self._next()):
            self._left = None if self._left is None else self._left - len(chunk)
            self._held += chunk
            match = self._pattern.search(self._held, max(0, self._searched - self._longest))
            if match and self._is_plain():
                yield self._whole_documents()
            elif match:
                yield from self._one_by_one(match.start())
            self._pass_over()
            self._searched = len(self._held)
        yield self._one(self._offset, self._begun or self._held)

    def _next(self) -> int:
        return spans.CHUNK_BYTES if self._left is None else min(spans.CHUNK_BYTES, self._left)

    def _is_plain(self) -> bool:
        """Whether documents are what is between separators, to the byte: no CRLF, no BOM."""
        held = self._held
        is_short = len(held) <= self._limit and not self._begun
        has_bom = self._offset == 0 and held.startswith(BOM)
        return is_short and not has_bom and b"\r" not in held

    def _whole_documents(self) -> Cut:
        *whole, rest = self._held.split(self._plain)
        offset = self._offset
        self._offset += len(self._held) - len(rest)
        self._held = rest
        return offset, whole, len(self._plain)

    def _one_by_one(self, first: int) -> Iterator[Cut]:
        start, held, offset = 0, self._held, self._offset
        for match in self._pattern.finditer(held, first):
            end = match.start()
            if self._is_line and end > start and held[end - 1] == CR:
                end -= 1  # of the separator
            yield self._one(offset + start, self._begun or held[start:end])
            start, self._begun = match.end(), b""
        self._held, self._offset = held[start:], offset + start

    def _pass_over(self) -> None:
        if len(self._held) > self._limit:
            self._begun = self._begun or self._held
            self._offset += len(self._held) - self._longest
            self._held = self._held[-self._longest :]

    @staticmethod
    def _one(offset: int, raw: bytes) -> Cut:
        offset, raw = without_bom(offset, raw)
        return offset, [raw], 0


def without_bom(offset: int, raw: bytes) -> tuple[int, bytes]:
    """The same without the byte order mark of a file's beginning."""
    if offset == 0 and raw.startswith(BOM):
        return len(BOM), raw[len(BOM) :]
    return offset, raw
