"""Characters that are newer than this Python's Unicode.

Libraries split a text by properties of characters, each by the version of Unicode that it was built
with; they agree on characters that have been settled for years. Python 3.10 to 3.13 know Unicode 13
to 15.1, older than what both libraries know.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence

import numpy as np

_ASCII = bytes(range(128))
BLOCK = 256


class UnicodeGuard:
    """Finds texts with characters that this Python's Unicode does not know."""

    def __init__(self) -> None:
        self._unknown = np.zeros(sys.maxunicode + 1, bool)
        """bool [code points], filled in by blocks: all of Unicode takes 0.1 s."""
        self._is_filled = np.zeros(len(self._unknown) // BLOCK, bool)

    def _fill(self, points: np.ndarray) -> None:
        """See to it that the blocks of these code points are there."""
        needed = np.zeros_like(self._is_filled)
        needed[points // BLOCK] = True
        for block in np.flatnonzero(needed & ~self._is_filled).tolist():
            codes = range(block * BLOCK, (block + 1) * BLOCK)
            unknown = [unicodedata.category(chr(code)) == "Cn" for code in codes]
            self._unknown[codes.start : codes.stop] = unknown
            self._is_filled[block] = True

    def within(self, texts: Sequence[bytes]) -> list[int]:
        """Which of these UTF-8 texts have one; about 1 ms per MB that is not ASCII."""
        others = [i for i, text in enumerate(texts) if not text.isascii()]
        if not others or not self._any(b"".join([texts[i] for i in others])):
            return []
        return [i for i in others if self._any(texts[i])]

    def _any(self, text: bytes) -> bool:
        points = np.frombuffer(text.translate(None, _ASCII).decode().encode("utf-32-le"), "<u4")
        self._fill(points)
        return bool(self._unknown[points].any())
