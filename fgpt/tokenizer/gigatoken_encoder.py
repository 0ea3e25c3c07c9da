"""`gigatoken`: BPE of both kinds (tokenizer.json, SentencePiece), not Unigram or WordPiece.

It remembers the words it has seen, which makes it many times faster than the libraries. What it
remembers grows without bound, by up to GROWTH bytes for a byte of text never seen before: past
CACHE_BYTES it is started afresh, which changes no id.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from fgpt.tokenizer.base import Ids
from fgpt.tokenizer.errors import refusals
from fgpt.tokenizer.gigatoken_settings import GigaSettings

CACHE_BYTES = 2**29
GROWTH = 8
_STATM = Path("/proc/self/statm")


class Gigatoken:
    """The library gigatoken, encoding on the calling thread."""

    def __init__(self, settings: GigaSettings):
        """Raises NoFastEncoder."""
        self._settings = settings
        with refusals("gigatoken cannot read this tokenizer"):
            import gigatoken

            self._reader = gigatoken.Tokenizer.from_json
            self._start()

    def __call__(self, texts: list[bytes]) -> Ids:
        """UTF-8 texts -> all ids end to end, uint32, and the length of each, int64 [texts].

        Raises NoFastEncoder if the library fails.
        """
        if self._settings.names is not None:
            texts = [text.translate(self._settings.names) for text in texts]
        with refusals("gigatoken cannot encode this text"):
            # one by one: `encode_batch` forgets a SentencePiece tokenizer's words at each call
            # (half the speed), and its arrays take a library, awkward, that is slow to import
            found = [np.zeros(0, np.uint32), *map(self._backend.encode, texts)]
        self._seen_bytes += sum(map(len, texts))
        if self._grown_bytes() > CACHE_BYTES:
            self._start()
        lengths = np.fromiter(map(len, found), np.int64, len(found))
        return np.concatenate(found), lengths[1:]

    def _start(self) -> None:
        self._backend: Any = None  # frees what the old one remembers before the new one is made
        self._backend = self._reader(self._settings.json).backend
        self._seen_bytes = 0
        self._start_bytes = _resident_bytes()

    def _grown_bytes(self) -> int:
        """Memory of this process since the start; where the system does not say, the most."""
        now = _resident_bytes()
        return now - self._start_bytes if now else GROWTH * self._seen_bytes


def _resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
