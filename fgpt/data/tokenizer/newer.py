"""Characters that are newer than this Python's Unicode.

Libraries split a text by properties of characters, each by the version of Unicode that it was built
with; they agree on characters that have been settled for years. Python 3.10 to 3.13 know Unicode 13
to 15.1, older than what both libraries know.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from functools import cached_property

import numpy as np

_ASCII = bytes(range(128))
_INHABITED = ((0, 0x40000), (0xE0000, 0xE1000), (0xF0000, 0x110000))
"""Code points from .. up to; nothing has been assigned to the planes between."""


class NewerCharacters:
    """Finds texts with characters that this Python's Unicode does not know."""

    @cached_property
    def _unknown(self) -> np.ndarray:
        """bool [number of code points]; takes 0.1 s, so not before a text needs it."""
        unknown = np.ones(sys.maxunicode + 1, bool)
        for first, last in _INHABITED:
            category = (unicodedata.category(chr(c)) for c in range(first, last))
            unknown[first:last] = [name == "Cn" for name in category]
        return unknown

    def within(self, texts: Sequence[bytes]) -> list[int]:
        """Which of these UTF-8 texts have one; about 1 ms per MB that is not ASCII."""
        others = [i for i, text in enumerate(texts) if not text.isascii()]
        if not others or not self._any(b"".join([texts[i] for i in others])):
            return []
        return [i for i in others if self._any(texts[i])]

    def _any(self, text: bytes) -> bool:
        points = np.frombuffer(text.translate(None, _ASCII).decode().encode("utf-32-le"), "<u4")
        return bool(self._unknown[points].any())
