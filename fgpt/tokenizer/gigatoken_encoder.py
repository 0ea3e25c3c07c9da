"""The library `gigatoken` as an encoder: BPE from a tokenizer.json or a SentencePiece .model.

It caches the words it has encoded, which makes it many times faster than the libraries.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from fgpt.tokenizer.base import Ids, Tokenizer, split_ids
from fgpt.tokenizer.errors import FastEncoderUnavailable, as_unavailable
from fgpt.tokenizer.hf_tokenizer import HFTokenizer
from fgpt.utils.process import resident_bytes

CACHE_BYTES = 2**29
"""gigatoken's cache has no limit; beyond this size we restart gigatoken, which changes no id."""
KINDS = ("BPE", "sentencepiece-bpe")
_ASCII = bytes(range(128))


class Gigatoken:
    """Encodes with gigatoken on the calling thread; not thread-safe."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises FastEncoderUnavailable."""
        self.check(tokenizer)
        self._tokenizer = tokenizer
        self._guard = UnicodeGuard()
        with as_unavailable(f"gigatoken cannot read this {tokenizer.kind}"):
            import gigatoken

            self._load = gigatoken.Tokenizer.from_json
            self._json = _to_json(tokenizer)
            self._start()

    @staticmethod
    def check(tokenizer: Tokenizer) -> None:
        """Raise FastEncoderUnavailable if gigatoken is not installed or has no such model."""
        if tokenizer.kind not in KINDS:
            raise FastEncoderUnavailable(f"gigatoken does not support {tokenizer.kind}")
        try:
            import gigatoken  # noqa: F401
        except ImportError as error:
            remedy = "pip install gigatoken makes encoding many times faster"
            raise FastEncoderUnavailable(
                f"gigatoken is not installed ({error}); {remedy}"
            ) from error

    def __call__(self, texts: list[bytes]) -> Ids:
        """Return the ids of UTF-8 texts. Raises FastEncoderUnavailable if gigatoken fails.

        Texts with characters on which the two libraries may disagree go to the tokenizer's own.
        """
        unsafe = self._guard.find(texts)
        if not unsafe:
            ids = self._encode_each(texts)
        else:
            exact = split_ids(*self._tokenizer.encode_with_library([texts[i] for i in unsafe]))
            by_text = dict(zip(unsafe, exact, strict=True))
            safe = [i for i in range(len(texts)) if i not in by_text]
            by_text |= zip(safe, self._encode_each([texts[i] for i in safe]), strict=True)
            ids = [by_text[i] for i in range(len(texts))]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.concatenate([np.zeros(0, np.uint32), *ids]), lengths

    def _encode_each(self, texts: list[bytes]) -> list[np.ndarray]:
        with as_unavailable("gigatoken cannot encode this text"):
            # One by one: `encode_batch` drops the cache of a SentencePiece tokenizer at each call
            # (half the speed), and its arrays need the library awkward, which is slow to import.
            ids = [self._backend.encode(text) for text in texts]
        if resident_bytes() - self._start_bytes > CACHE_BYTES:
            self._start()
        return ids

    def _start(self) -> None:
        self._backend: Any = None  # frees the old cache first
        self._backend = self._load(self._json).backend
        self._start_bytes = resident_bytes()


def _to_json(tokenizer: Tokenizer) -> str:
    """Return a tokenizer.json for gigatoken; without special tokens where these are text."""
    if isinstance(tokenizer, HFTokenizer):
        settings = dict(tokenizer.settings)
    else:
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        settings = json.loads(sentencepiece_to_tokenizer_json(tokenizer.raw))
    added = settings.get("added_tokens") or []
    special = {token["content"] for token in added if token.get("special")}
    if not isinstance(tokenizer, HFTokenizer):  # the converter creates merges for special tokens
        model = settings["model"]
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) not in special]
    if tokenizer.special_tokens == "text":
        settings["added_tokens"] = [token for token in added if token["content"] not in special]
    return json.dumps(settings)


class UnicodeGuard:
    """Finds texts with characters that are not assigned in this Python's version of Unicode.

    Libraries split text by character properties, each by the Unicode version it was built with;
    they agree on characters that have been assigned for years. Python 3.10 - 3.13 have Unicode 13
    - 15.1, older than both libraries.
    """

    BLOCK = 256

    def __init__(self) -> None:
        self._is_unassigned = np.zeros(sys.maxunicode + 1, bool)
        """bool [code points], filled in block by block: all of Unicode takes 0.1 s."""
        self._is_filled = np.zeros(len(self._is_unassigned) // self.BLOCK, bool)

    def find(self, texts: Sequence[bytes]) -> list[int]:
        """Return the positions of such texts (UTF-8); takes 1 ms per MB that is not ASCII."""
        others = [i for i, text in enumerate(texts) if not text.isascii()]
        if not others or not self._has_unassigned(b"".join([texts[i] for i in others])):
            return []
        return [i for i in others if self._has_unassigned(texts[i])]

    def _has_unassigned(self, text: bytes) -> bool:
        points = np.frombuffer(text.translate(None, _ASCII).decode().encode("utf-32-le"), "<u4")
        needed = np.zeros_like(self._is_filled)
        needed[points // self.BLOCK] = True
        for block in np.flatnonzero(needed & ~self._is_filled).tolist():
            codes = range(block * self.BLOCK, (block + 1) * self.BLOCK)
            unassigned = [unicodedata.category(chr(code)) == "Cn" for code in codes]
            self._is_unassigned[codes.start : codes.stop] = unassigned
            self._is_filled[block] = True
        return bool(self._is_unassigned[points].any())
