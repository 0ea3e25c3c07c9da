"""`gigatoken`: BPE of both kinds (tokenizer.json, SentencePiece), not Unigram or WordPiece.

It remembers the words it has seen, which makes it many times faster than the libraries. What it
remembers grows without bound, by up to 7 bytes for a byte of text never seen before: past
CACHE_BYTES it is started afresh, which changes no id.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fgpt.data.tokenizer.base import Ids, Tokenizer
from fgpt.data.tokenizer.jsonfile import JsonTokenizer
from fgpt.errors import DataError

CACHE_BYTES = 2**29
_STATM = Path("/proc/self/statm")


class NoGigatoken(DataError):
    """gigatoken is not there, or cannot read this tokenizer."""


class Gigatoken:
    """The library gigatoken, encoding on the calling thread."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises NoGigatoken."""
        try:
            import gigatoken
        except ImportError as error:
            fix = "pip install gigatoken makes encoding many times faster"
            raise NoGigatoken(f"gigatoken is not installed ({error}); {fix}") from error
        with _refusals(f"gigatoken cannot read this {tokenizer.kind}"):
            self._settings = _settings(tokenizer)
            self._reader = gigatoken.Tokenizer.from_json
            self._start()

    def __call__(self, texts: list[bytes]) -> Ids:
        """UTF-8 texts -> all ids end to end, uint32, and the length of each, int64 [texts].

        Raises NoGigatoken if the library fails.
        """
        with _refusals("gigatoken cannot encode this text"):
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
        self._backend = self._reader(self._settings).backend
        self._seen_bytes = 0
        self._start_bytes = _resident_bytes()

    def _grown_bytes(self) -> int:
        """Memory of this process since the start; where the system does not say, the most."""
        now = _resident_bytes()
        return now - self._start_bytes if now else 7 * self._seen_bytes


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Make a NoGigatoken of anything the library raises, a panic (no Exception) included."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise NoGigatoken(f"{what} ({reason})") from error


def _resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _settings(tokenizer: Tokenizer) -> str:
    """A tokenizer.json that gigatoken takes; where special tokens are text, without them."""
    if isinstance(tokenizer, JsonTokenizer):
        settings = dict(tokenizer.settings)
    else:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        settings = json.loads(sentencepiece_to_tokenizer_json(tokenizer.raw))
    added = settings.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")}
    if not isinstance(tokenizer, JsonTokenizer):  # the converter makes merges for every piece
        model = settings["model"]
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in special]
    if tokenizer.special_tokens == "text":
        settings["added_tokens"] = [token for token in added if token["content"] not in special]
    return json.dumps(settings)
