"""Bytes -> text under a stated policy: what a document may contain, and what happens if not.

strict    the first flaw ends the run: DataError with file and byte offset
replace   undecodable bytes, NUL and lone surrogates become U+FFFD; nothing else is forgiven
skip      a flawed document (or unreadable file) is left out and counted in the data card
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from fgpt.data.recipe import Errors

BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")
_FOREIGN = {
    b"\x1f\x8b": "gzip data; name the file .gz",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstandard data; name the file .zst",
    b"BZh": "bzip2 data; unpack it first",
    b"\xfd7zXZ": "xz data; unpack it first",
    b"PAR1": "parquet data; name the file .parquet",
    b"\xff\xfe": "UTF-16 text; convert it to UTF-8",
    b"\xfe\xff": "UTF-16 text; convert it to UTF-8",
}
ODD_HEADS = (BOM, *_FOREIGN)
"""How a file begins that is not text from its first byte on."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus."""

    source: str
    """File it came from."""
    data: bytes
    """The text; valid UTF-8, without NUL."""

    @property
    def text(self) -> str:
        """The text as a string."""
        return self.data.decode()


class Texts(NamedTuple):
    """Some texts of one file, in its order: readers give many at a time."""

    source: str
    """File they came from."""
    data: list[bytes]
    """The texts; valid UTF-8, without NUL."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why a document cannot be used."""

    where: str
    """File, with line, row or byte offset."""
    what: str
    """The fault and its remedy."""

    def at(self, source: str) -> Flaw:
        """The same, `where` being a place inside `source`."""
        return Flaw(source + self.where, self.what)

    def __str__(self) -> str:
        # File names and JSON keys may hold anything; a message is one printable line.
        line = f"{self.where}: {self.what}"
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def foreign(head: bytes) -> Flaw | None:
    """Compressed or UTF-16 content under a text file's name: a flaw under every policy."""
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            return Flaw("", f"this is {what}")
    return None


def are_sound(texts: Iterable[bytes]) -> bool:
    """Whether each of these is UTF-8 without NUL: what every policy takes as it is."""
    try:
        for text in texts:
            if not text.isascii():
                text.decode()
            if b"\0" in text:
                return False
    except UnicodeDecodeError:
        return False
    return True


def decode(raw: bytes, offset: int, errors: Errors) -> bytes | Flaw:
    """Check UTF-8 bytes that begin at byte `offset` of the file; replace what the policy lets."""
    if errors == "replace":
        if raw.isascii() and b"\0" not in raw:
            return raw
        return raw.decode("utf-8", "replace").replace("\0", "\ufffd").encode()
    try:
        if not raw.isascii():
            raw.decode()
    except UnicodeDecodeError as error:
        at = offset + error.start
        what = f"not UTF-8 ({error.reason}); convert the file or choose errors replace or skip"
        return Flaw(f": byte {at}", what)
    if b"\0" in raw:
        at = offset + raw.index(b"\0")
        what = "a NUL byte, so probably not text; remove the file or choose errors replace or skip"
        return Flaw(f": byte {at}", what)
    return raw


def accept(text: str, errors: Errors) -> bytes | Flaw:
    """Check text that a parser decoded already (JSON strings may hold NUL and lone surrogates)."""
    if errors == "replace":
        text = _SURROGATES.sub("\ufffd", text).replace("\0", "\ufffd")
    elif "\0" in text:
        return Flaw("", "a NUL character in the text; remove it or choose errors replace or skip")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        what = f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        return Flaw("", f"{what}; repair it or choose errors replace or skip")
