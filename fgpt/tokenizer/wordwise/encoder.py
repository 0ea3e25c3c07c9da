"""A SentencePiece model for the C code: which it can encode with, and how it is called."""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass
from math import isfinite

import numpy as np

from fgpt.tokenizer import sentencepiece_proto
from fgpt.tokenizer.base import Ids, Tokenizer
from fgpt.tokenizer.errors import NoFastEncoder, refusals
from fgpt.tokenizer.sentencepiece_model import BLANK, SentencePieceTokenizer
from fgpt.tokenizer.sentencepiece_proto import ModelFacts
from fgpt.tokenizer.wordwise.build import shared_object

KINDS = ("unigram", "bpe")
UNKNOWN_PENALTY = np.float32(10)
"""What an unknown character costs more than the worst piece (kUnkPenalty of sentencepiece)."""
MAX_IDS = 2**21 - 1
LOWEST = -1e30
"""Of Unigram's scores: their sums must be finite."""
_PADDING = bytes(16)


@dataclass(frozen=True)
class WordSettings:
    """A model as the C code takes it; picklable, arrays as bytes."""

    shared_object: str
    """Path of the compiled C code."""
    kind: str
    """One of KINDS."""
    has_prefix: bool
    """The model takes U+2581 in a text for a blank, and puts a blank in front."""
    pieces: bytes
    """UTF-8 end to end, a blank for U+2581, sorted by bytes; and _PADDING."""
    ends: bytes
    """int64 [pieces]: where each ends."""
    ids: bytes
    """int32 [pieces]: the id of each."""
    scores: bytes
    """float32 [ids + 1]: the score of each id, and 0."""
    byte_ids: bytes
    """uint32 [256]: the id of each byte."""

    @property
    def name(self) -> str:
        """The encoder's name."""
        return "wordwise"


def word_settings(tokenizer: Tokenizer) -> WordSettings:
    """Settings for `tokenizer`. Raises NoFastEncoder saying why there are none."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise NoFastEncoder("wordwise is for SentencePiece models")
    facts = tokenizer.facts
    fault = _fault(facts)
    if fault:
        raise NoFastEncoder(f"wordwise cannot encode with this {tokenizer.kind} ({fault})")
    path = str(shared_object())
    normal = facts.of_type(sentencepiece_proto.NORMAL)
    pieces = sorted((piece.replace(BLANK, " ").encode(), i) for piece, i in normal.items())
    by_byte = facts.of_type(sentencepiece_proto.BYTE)
    return WordSettings(
        path,
        facts.kind,
        facts.has_prefix,
        b"".join([*(piece for piece, _ in pieces), _PADDING]),
        np.cumsum([len(piece) for piece, _ in pieces], dtype=np.int64).tobytes(),
        np.array([i for _, i in pieces], np.int32).tobytes(),
        np.array([*facts.scores, 0], np.float32).tobytes(),
        np.array([by_byte[f"<0x{byte:02X}>"] for byte in range(256)], np.uint32).tobytes(),
    )


def _fault(facts: ModelFacts) -> str | None:
    """What of a model the C code does not know; None if it knows all."""
    pieces = facts.of_type(sentencepiece_proto.NORMAL)
    others = {
        sentencepiece_proto.USER_DEFINED: "user-defined",
        sentencepiece_proto.UNUSED: "unused",
    }
    for kind, name in others.items():
        if facts.of_type(kind):
            return f"it has {name} pieces"
    if facts.kind not in KINDS:
        return f"its kind is {facts.kind}"
    if not facts.is_plain:
        return "it normalizes text"
    if not facts.of_type(sentencepiece_proto.BYTE):
        return "it has no pieces for bytes"
    if BLANK not in pieces or any(" " in piece for piece in pieces):
        return "blanks are not written as U+2581"
    if "\0" in pieces:  # unused, says the library
        return "it has a piece for NUL"
    if len(facts.pieces) > MAX_IDS:
        return f"it has {len(facts.pieces)} ids"
    scores = [facts.scores[i] for i in pieces.values()]
    if not all(map(isfinite, scores)):
        return "it has scores that are not finite"
    if facts.kind == "unigram" and not LOWEST <= min(scores) <= max(scores) <= 0:
        return f"it has scores outside {LOWEST:g} .. 0"
    return None


class Wordwise:
    """The C code, encoding on the calling thread; for one thread at a time."""

    def __init__(self, settings: WordSettings):
        """Raises NoFastEncoder."""
        self._has_prefix = settings.has_prefix
        ids = np.frombuffer(settings.ids, np.int32)
        scores = np.frombuffer(settings.scores, np.float32).copy()
        unknown_score = scores[ids].min() - UNKNOWN_PENALTY
        # an unknown character becomes its bytes: the first adds its score, those behind nothing
        byte_ids = np.frombuffer(settings.byte_ids, np.uint32)
        scores[byte_ids] = unknown_score
        scores[byte_ids[0x80:0xC0]] = 0
        self._kept = (settings, scores, _ranks(scores))  # the C code reads from them
        with refusals("wordwise cannot be loaded"):
            library = _library(settings.shared_object)
        self._encode = library.words_encode
        self._words = library.words_new(
            KINDS.index(settings.kind), settings.pieces, settings.ends, settings.ids, len(ids),
            *(array.ctypes.data for array in self._kept[1:]), len(scores) - 1, unknown_score,
            settings.byte_ids,
        )  # fmt: skip
        if not self._words:
            raise NoFastEncoder("wordwise: out of memory")
        weakref.finalize(self, library.words_free, self._words)

    def __call__(self, texts: list[bytes]) -> Ids:
        """UTF-8 texts -> all ids end to end, uint32, and the length of each, int64 [texts].

        Raises NoFastEncoder if memory runs out.
        """
        if self._has_prefix:
            texts = [text and b" " + text.replace(BLANK.encode(), b" ") for text in texts]
        joined = b"".join([*texts, _PADDING])
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        ids = np.empty(len(joined), np.uint32)
        lengths = np.empty(len(texts), np.int64)
        count = self._encode(
            self._words, joined, ends.ctypes.data, len(texts), ids.ctypes.data, lengths.ctypes.data
        )
        if count < 0:
            raise NoFastEncoder("wordwise: out of memory")
        return ids[:count], lengths


def _library(path: str) -> ctypes.CDLL:
    library = ctypes.CDLL(path)
    pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64
    library.words_new.restype = pointer
    library.words_new.argtypes = [
        ctypes.c_int, text, text, text, number, pointer, pointer, ctypes.c_uint32, ctypes.c_float,
        text,
    ]  # fmt: skip
    library.words_encode.restype = number
    library.words_encode.argtypes = [pointer, text, pointer, number, pointer, pointer]
    library.words_free.restype = None
    library.words_free.argtypes = [pointer]
    return library


def _ranks(scores: np.ndarray) -> np.ndarray:
    """uint32 that are ordered as these float32 are, with -0 below 0, as the library has it."""
    bits = scores.view(np.uint32)
    ranks: np.ndarray = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return ranks
