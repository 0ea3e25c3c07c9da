"""Bytes -> text under a stated policy: what a document may contain, and what happens if not.

strict    the first flaw ends the run: DataError with file and byte offset
replace   undecodable bytes, NUL and lone surrogates become U+FFFD; nothing else is forgiven
skip      a flawed document (or unreadable file) is left out and counted in the data card
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Errors = Literal["strict", "replace", "skip"]

BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")
_FOREIGN = {
    b"\x1f\x8b": "gzip data; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstandard data; unpack it first",
    b"BZh": "bzip2 data; unpack it first",
    b"\xfd7zXZ": "xz data; unpack it first",
    b"PAR1": "parquet data; name the file .parquet",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}


@dataclass(frozen=True)
class Document:
    """One text of a corpus."""

    source: str
    """File (and line or row) it came from."""
    text: str
    """The text; encodable as UTF-8, without NUL."""


@dataclass(frozen=True)
class Flaw:
    """Why a document cannot be used."""

    where: str
    """File, with line, row or byte offset."""
    what: str
    """The fault and its remedy."""

    def __str__(self) -> str:
        # File names and JSON keys may hold anything; a message is one printable line.
        line = f"{self.where}: {self.what}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def foreign(head: bytes, source: str) -> Flaw | None:
    """Compressed or UTF-16 content under a text file's name: a flaw under every policy."""
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            return Flaw(source, f"this is {what}")
    return None


def decode(raw: bytes, source: str, offset: int, errors: Errors) -> Document | Flaw:
    """Decode UTF-8 bytes that begin at byte `offset` of the file."""
    try:
        text = raw.decode("utf-8", "replace" if errors == "replace" else "strict")
    except UnicodeDecodeError as error:
        at = offset + error.start
        what = f"not UTF-8 ({error.reason}); convert the file or choose errors replace or skip"
        return Flaw(f"{source}: byte {at}", what)
    if "\0" in text and errors != "replace":
        at = offset + raw.index(b"\0")
        what = "a NUL byte, so probably not text; remove the file or choose errors replace or skip"
        return Flaw(f"{source}: byte {at}", what)
    return Document(source, text.replace("\0", "\ufffd"))


def accept(text: str, source: str, errors: Errors) -> Document | Flaw:
    """Check text that a parser decoded already (JSON strings may hold NUL and lone surrogates)."""
    if errors == "replace":
        return Document(source, _SURROGATES.sub("\ufffd", text).replace("\0", "\ufffd"))
    if "\0" in text:
        return Flaw(
            source, "a NUL character in the text; remove it or choose errors replace or skip"
        )
    lone = None if text.isascii() else _SURROGATES.search(text)
    if lone:
        what = f"lone surrogate U+{ord(lone[0]):04X} at character {lone.start()}"
        return Flaw(source, f"{what}; repair it or choose errors replace or skip")
    return Document(source, text)
