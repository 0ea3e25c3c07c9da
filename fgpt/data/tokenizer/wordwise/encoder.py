"""A SentencePiece model for the C code: which it can encode with, and how it is called."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass

import numpy as np

from fgpt.data.tokenizer import modelproto
from fgpt.data.tokenizer.base import Ids, Tokenizer
from fgpt.data.tokenizer.modelproto import ModelFacts
from fgpt.data.tokenizer.refusal import NoFastEncoder, refusals
from fgpt.data.tokenizer.sentence import BLANK, SentencePieceTokenizer
from fgpt.data.tokenizer.wordwise.build import shared_object

KINDS = ("unigram", "bpe")
UNKNOWN_PENALTY = np.float32(10)
"""What an unknown character costs more than the worst piece (kUnkPenalty of sentencepiece)."""
MAX_IDS = 2**21 - 1
_PADDING = bytes(16)


@dataclass(frozen=True)
class WordSettings:
    """What a worker process needs besides the tokenizer; picklable."""

    shared_object: str
    """Path of the compiled C code."""

    @property
    def name(self) -> str:
        """The encoder's name."""
        return "wordwise"


def word_settings(tokenizer: Tokenizer) -> WordSettings:
    """Settings for `tokenizer`. Raises NoFastEncoder saying why there are none."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise NoFastEncoder("wordwise is for SentencePiece models")
    fault = _fault(tokenizer.facts)
    if fault:
        raise NoFastEncoder(f"wordwise cannot encode with this {tokenizer.kind} ({fault})")
    return WordSettings(str(shared_object()))


def _fault(facts: ModelFacts) -> str | None:
    """What of a model the C code does not know; None if it knows all."""
    pieces = facts.of_type(modelproto.NORMAL)
    others = {modelproto.USER_DEFINED: "user-defined", modelproto.UNUSED: "unused"}
    for kind, name in others.items():
        if facts.of_type(kind):
            return f"it has {name} pieces"
    if facts.kind not in KINDS:
        return f"its kind is {facts.kind}"
    if not facts.is_plain:
        return "it normalizes text"
    if not facts.of_type(modelproto.BYTE):
        return "it has no pieces for bytes"
    if BLANK not in pieces or any(" " in piece for piece in pieces):
        return "blanks are not written as U+2581"
    if len(facts.pieces) > MAX_IDS:
        return f"it has {len(facts.pieces)} ids"
    if facts.kind == "unigram" and max(facts.scores[i] for i in pieces.values()) > 0:
        return "it has scores above 0"
    return None


class Wordwise:
    """The C code, encoding on the calling thread; for one thread at a time."""

    def __init__(self, settings: WordSettings, tokenizer: Tokenizer):
        """Raises NoFastEncoder, MemoryError."""
        assert isinstance(tokenizer, SentencePieceTokenizer)
        facts = tokenizer.facts
        self._has_prefix = facts.has_prefix
        pieces = sorted(
            (piece.replace(BLANK, " ").encode(), i)
            for piece, i in facts.of_type(modelproto.NORMAL).items()
        )
        text = b"".join(piece for piece, _ in pieces) + _PADDING
        ends = np.cumsum([len(piece) for piece, _ in pieces], dtype=np.int64)
        ids = np.array([i for _, i in pieces], np.int32)
        scores = np.append(np.array(facts.scores, np.float32), np.float32(0))
        unknown_score = scores[ids].min() - UNKNOWN_PENALTY
        by_byte = facts.of_type(modelproto.BYTE)
        byte_ids = np.array([by_byte[f"<0x{byte:02X}>"] for byte in range(256)], np.uint32)
        self._kept = (scores, _ranks(scores), byte_ids)  # the C code reads them
        with refusals("wordwise cannot be loaded"):
            library = _library(settings.shared_object)
        self._encode = library.words_encode
        self._words = library.words_new(
            KINDS.index(facts.kind), text, ends.ctypes.data, ids.ctypes.data, len(ids),
            *(array.ctypes.data for array in self._kept[:2]), len(facts.pieces), unknown_score,
            byte_ids.ctypes.data,
        )  # fmt: skip
        if not self._words:
            raise MemoryError("wordwise")
        weakref.finalize(self, library.words_free, self._words)

    def __call__(self, texts: list[bytes]) -> Ids:
        """UTF-8 texts -> all ids end to end, uint32, and the length of each, int64 [texts].

        Raises MemoryError.
        """
        if self._has_prefix:  # such a model takes U+2581 for a blank, and puts one in front
            texts = [text and b" " + text.replace(BLANK.encode(), b" ") for text in texts]
        joined = b"".join([*texts, _PADDING])
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        ids = np.empty(len(joined), np.uint32)
        lengths = np.empty(len(texts), np.int64)
        count = self._encode(
            self._words, joined, ends.ctypes.data, len(texts), ids.ctypes.data, lengths.ctypes.data
        )
        if count < 0:
            raise MemoryError("wordwise")
        return ids[:count], lengths


def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.words_new.restype = pointer
    library.words_new.argtypes = [
        ctypes.c_int, ctypes.c_char_p, pointer, pointer, number, pointer, pointer, ctypes.c_uint32,
        ctypes.c_float, pointer,
    ]  # fmt: skip
    library.words_encode.restype = number
    library.words_encode.argtypes = [pointer, ctypes.c_char_p, pointer, number, pointer, pointer]
    library.words_free.restype = None
    library.words_free.argtypes = [pointer]
    return library


def _ranks(scores: np.ndarray) -> np.ndarray:
    """uint32 that are ordered as these float32 are, with -0 below 0, as the library has it."""
    bits = scores.view(np.uint32)
    ranks: np.ndarray = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return ranks
