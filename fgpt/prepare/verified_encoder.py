"""A worker's encoder: measures its time, and compares the ids of excerpts with the library's."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fgpt.tokenizer.base import Ids
from fgpt.tokenizer.encoders import EncoderSpec
from fgpt.tokenizer.errors import FastEncoderUnavailable

EXCERPTS, EXCERPT_BYTES = 4, 2**9


class VerifiedEncoder:
    """The encoder of a preparation, in one worker."""

    def __init__(self, spec: EncoderSpec):
        self._is_fast = spec.is_fast
        self._error: str | None = None
        try:
            self._encoder = spec.build()
        except FastEncoderUnavailable as error:  # reported by find_mismatch, with the first task
            self._error = str(error)
        self.spent_s = 0.0
        """Time spent in `encode` so far, in seconds."""

    def encode(self, texts: list[bytes]) -> Ids:
        """See `Encoder.encode`."""
        t0 = time.perf_counter()
        result = self._encoder.encode(texts)
        self.spent_s += time.perf_counter() - t0
        return result

    def find_mismatch(self, texts: list[bytes]) -> str | None:
        """Compare the ids of some excerpts with the tokenizer's own library.

        Returns None, or one line: what differs, or why the fast encoder cannot be used.
        """
        if self._error:
            return self._error
        return self._encoder.find_mismatch(list(excerpts(texts))) if self._is_fast else None


def excerpts(texts: list[bytes]) -> Iterator[bytes]:
    """Yield EXCERPTS excerpts of EXCERPT_BYTES, from evenly spaced texts, each at another relative
    position: many files start alike.
    """
    for i in range(EXCERPTS):
        text = texts[i * len(texts) // EXCERPTS]
        start = max(0, len(text) - EXCERPT_BYTES) * i // (EXCERPTS - 1)
        yield text[start : start + EXCERPT_BYTES].decode(errors="ignore").encode()
