"""A worker's encoder: its time is counted, its ids are compared at some spots."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fgpt.tokenizer.base import Ids
from fgpt.tokenizer.encoders import EncoderSpec
from fgpt.tokenizer.errors import NoFastEncoder

SPOTS, SPOT_BYTES = 4, 2**9


class TimedEncoder:
    """A job's encoder, with the time it took."""

    def __init__(self, spec: EncoderSpec):
        self._is_fast = spec.fast
        self._refusal: str | None = None
        try:
            self._encoder = spec.build()
        except NoFastEncoder as refusal:  # told by `fault`: the work begins again without it
            self._refusal = str(refusal)
        self.spent_s = 0.0
        """Time inside the encoder so far, in seconds."""

    def encode(self, texts: list[bytes]) -> Ids:
        """See `Encoder.encode`."""
        t0 = time.perf_counter()
        found = self._encoder.encode(texts)
        self.spent_s += time.perf_counter() - t0
        return found

    def fault(self, texts: list[bytes]) -> str | None:
        """How the ids of some spots of these texts are not those of the tokenizer's own library,
        or why the fast encoder cannot be used at all.
        """
        if self._refusal:
            return self._refusal
        return self._encoder.spot_check(list(spots(texts))) if self._is_fast else None


def spots(texts: list[bytes]) -> Iterator[bytes]:
    """SPOTS cuts of SPOT_BYTES, from texts all over these and from other parts of each: many files
    begin alike.
    """
    for i in range(SPOTS):
        text = texts[i * len(texts) // SPOTS]
        start = max(0, len(text) - SPOT_BYTES) * i // (SPOTS - 1)
        yield text[start : start + SPOT_BYTES].decode(errors="ignore").encode()
