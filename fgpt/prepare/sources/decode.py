"""Checking of text under the policies for malformed documents.

strict    the first malformed document raises DataError with file and byte offset
replace   undecodable bytes, NUL and lone surrogates become U+FFFD; other errors raise DataError
skip      malformed documents and unreadable files are left out and counted in the data card
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fgpt.data.recipe import Errors
from fgpt.errors import printable

BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")
_BINARY_FORMATS = {
    b"\x1f\x8b": "gzip data; name the file .gz",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstandard data; name the file .zst",
    b"BZh": "bzip2 data; unpack it first",
    b"\xfd7zXZ": "xz data; unpack it first",
    b"PAR1": "parquet data; name the file .parquet",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}
NON_TEXT_PREFIXES = (BOM, *_BINARY_FORMATS)
"""Beginnings of files that are not plain text from the first byte on."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus: valid UTF-8 without NUL, and its file."""

    source: str
    data: bytes

    @property
    def text(self) -> str:
        return self.data.decode()


class DocumentBatch(NamedTuple):
    """Documents of one file, in its order: valid UTF-8 without NUL."""

    source: str
    texts: list[bytes]


@dataclass(frozen=True, slots=True)
class MalformedDocument:
    """A document that cannot be used, and why."""

    location: str  # file, with line, row or byte offset
    problem: str  # the problem and its remedy

    def within(self, source: str) -> MalformedDocument:
        """Return the same with `location` inside `source`."""
        return MalformedDocument(source + self.location, self.problem)

    def __str__(self) -> str:
        # file names and JSON keys may contain anything; a message is one printable line
        return printable(f"{self.location}: {self.problem}")


def detect_binary_format(head: bytes) -> MalformedDocument | None:
    """Return the problem of a text file that begins like compressed data or UTF-16, or None.

    Such a file is malformed under every policy.
    """
    for magic, description in _BINARY_FORMATS.items():
        if head.startswith(magic):
            return MalformedDocument("", f"this is {description}")
    return None


def are_valid(texts: Iterable[bytes]) -> bool:
    """Return whether all texts are UTF-8 without NUL, which every policy accepts unchanged."""
    try:
        for text in texts:
            if not text.isascii():
                text.decode()
            if b"\0" in text:
                return False
    except UnicodeDecodeError:
        return False
    return True


def check_utf8(raw: bytes, offset: int, errors: Errors) -> bytes | MalformedDocument:
    """Check the bytes at `offset` of a file; returns valid UTF-8, after errors = replace."""
    if errors == "replace":
        if raw.isascii() and b"\0" not in raw:
            return raw
        return raw.decode("utf-8", "replace").replace("\0", "\ufffd").encode()
    try:
        if not raw.isascii():
            raw.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error.reason}); convert the file or choose errors replace or skip"
        return MalformedDocument(f": byte {offset + error.start}", problem)
    if b"\0" in raw:
        at = offset + raw.index(b"\0")
        fix = "remove the file or choose errors replace or skip"
        return MalformedDocument(f": byte {at}", f"a NUL byte, so probably not text; {fix}")
    return raw


def check_string(text: str, errors: Errors) -> bytes | MalformedDocument:
    """The same for a string from a parser: JSON strings may contain NUL and lone surrogates."""
    if errors == "replace":
        text = _SURROGATES.sub("\ufffd", text).replace("\0", "\ufffd")
    elif "\0" in text:
        fix = "remove it or choose errors replace or skip"
        return MalformedDocument("", f"a NUL character in the text; {fix}")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X} at character {error.start}"
        fix = "repair it or choose errors replace or skip"
        return MalformedDocument("", f"lone surrogate {character}; {fix}")
