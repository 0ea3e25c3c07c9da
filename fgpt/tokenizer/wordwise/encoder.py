"""Wordwise: checks a SentencePiece model, prepares its tables and calls the C code."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import weakref
from math import isfinite
from pathlib import Path

import numpy as np

from fgpt.tokenizer.base import Ids, Tokenizer
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.sentencepiece_model import (
    BLANK,
    ModelInfo,
    PieceType,
    SentencePieceTokenizer,
)

KINDS = ("unigram", "bpe")
"""Model kinds, in the order of the C code's enum."""
UNKNOWN_PENALTY = np.float32(10)
"""The score of an unknown character is the lowest piece score minus this (sentencepiece's
kUnkPenalty)."""
MAX_IDS = 2**21 - 1
LOWEST_SCORE = -1e30
"""For Unigram: sums of scores must stay finite."""
PADDING = bytes(16)
"""The C code reads up to this many bytes behind its input."""
REMEDY = "install a C compiler and Python's headers, then reinstall fgpt (pip install -e .)"


class Wordwise:
    """Encodes with the C code on the calling thread; not thread-safe."""

    def __init__(self, tokenizer: Tokenizer):
        """Raises FastEncoderUnavailable."""
        info = supported_model(tokenizer)
        library = load_library()
        self._has_dummy_prefix = info.has_dummy_prefix
        normal = info.ids_of_type(PieceType.NORMAL)
        pieces = sorted((piece.replace(BLANK, " ").encode(), i) for piece, i in normal.items())
        ends = np.cumsum([len(piece) for piece, _ in pieces], dtype=np.int64)
        ids = np.array([i for _, i in pieces], np.int32)
        by_byte = info.ids_of_type(PieceType.BYTE)
        byte_ids = np.array([by_byte[f"<0x{byte:02X}>"] for byte in range(256)], np.uint32)
        scores = np.array([*info.scores, 0], np.float32)
        unknown_score = scores[ids].min() - UNKNOWN_PENALTY
        # an unknown character becomes its bytes: the first one has its score, the others add 0
        scores[byte_ids] = unknown_score
        scores[byte_ids[0x80:0xC0]] = 0
        ranks = _sortable_bits(scores)
        self._arrays = (scores, ranks, byte_ids)  # the C code keeps pointers to these
        self._encode = library.wordwise_encode
        self._handle = library.wordwise_new(
            KINDS.index(info.kind),
            b"".join([*(piece for piece, _ in pieces), PADDING]),
            ends.ctypes.data,
            ids.ctypes.data,
            len(ids),
            scores.ctypes.data,
            ranks.ctypes.data,
            len(scores) - 1,
            unknown_score,
            byte_ids.ctypes.data,
        )
        if not self._handle:
            raise FastEncoderUnavailable("wordwise: out of memory")
        weakref.finalize(self, library.wordwise_free, self._handle)

    @staticmethod
    def check(tokenizer: Tokenizer) -> None:
        """Raise FastEncoderUnavailable if the C code is missing or does not support this model."""
        supported_model(tokenizer)
        load_library()

    def __call__(self, texts: list[bytes]) -> Ids:
        """Return the ids of UTF-8 texts. Raises FastEncoderUnavailable if memory runs out."""
        if self._has_dummy_prefix:
            texts = [text and b" " + text.replace(BLANK.encode(), b" ") for text in texts]
        joined = b"".join([*texts, PADDING])
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        ids = np.empty(len(joined), np.uint32)
        lengths = np.empty(len(texts), np.int64)
        count = self._encode(
            self._handle, joined, ends.ctypes.data, len(texts), ids.ctypes.data, lengths.ctypes.data
        )
        if count < 0:
            raise FastEncoderUnavailable("wordwise: out of memory")
        return ids[:count], lengths


def load_library() -> ctypes.CDLL:
    """Load the C extension, whose calls release the GIL.

    Raises FastEncoderUnavailable if it is not built, or was built from other sources (setup.py).
    """
    try:
        extension = importlib.import_module("fgpt.tokenizer.wordwise._wordwise")
    except ModuleNotFoundError as error:
        raise FastEncoderUnavailable(f"wordwise is not built: {REMEDY}") from error
    except ImportError as error:
        raise FastEncoderUnavailable(f"wordwise cannot be loaded ({error}): {REMEDY}") from error
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))  # a wheel has none
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sources))
    if sources and extension.SOURCE_HASH != digest.hexdigest():
        raise FastEncoderUnavailable(
            "wordwise was built from other sources: build it again with: pip install -e ."
        )
    library = ctypes.CDLL(extension.__file__)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.wordwise_new.restype = pointer
    library.wordwise_new.argtypes = [
        *(ctypes.c_int, ctypes.c_char_p, pointer, pointer, integer),
        *(pointer, pointer, ctypes.c_uint32, ctypes.c_float, pointer),
    ]
    library.wordwise_encode.restype = integer
    library.wordwise_encode.argtypes = [
        *(pointer, ctypes.c_char_p, pointer, integer, pointer, pointer)
    ]
    library.wordwise_free.restype = None
    library.wordwise_free.argtypes = [pointer]
    return library


def supported_model(tokenizer: Tokenizer) -> ModelInfo:
    """Return the model of a tokenizer. Raises FastEncoderUnavailable if it is not supported."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise FastEncoderUnavailable("wordwise supports only SentencePiece models")
    reason = _unsupported_feature(tokenizer.info)
    if reason:
        raise FastEncoderUnavailable(f"wordwise does not support this {tokenizer.kind} ({reason})")
    return tokenizer.info


def _unsupported_feature(info: ModelInfo) -> str | None:
    """Return what the C code does not support in a model, None if it supports everything."""
    if PieceType.USER_DEFINED in info.types:
        return "it has user-defined pieces"
    if PieceType.UNUSED in info.types:
        return "it has unused pieces"
    if info.kind not in KINDS:
        return f"its kind is {info.kind}"
    if not info.is_identity:
        return "it normalizes text"
    if PieceType.BYTE not in info.types:
        return "it has no byte pieces"
    pieces = info.ids_of_type(PieceType.NORMAL)
    if BLANK not in pieces or any(" " in piece for piece in pieces):
        return "blanks are not written as U+2581"
    if "\0" in pieces:  # the library treats it as unused
        return "it has a piece for NUL"
    if len(info.pieces) > MAX_IDS:
        return f"it has {len(info.pieces)} ids"
    scores = [info.scores[i] for i in pieces.values()]
    if not all(map(isfinite, scores)):
        return "it has scores that are not finite"
    if info.kind == "unigram" and not LOWEST_SCORE <= min(scores) <= max(scores) <= 0:
        return f"it has scores outside {LOWEST_SCORE:g} .. 0"
    return None


def _sortable_bits(scores: np.ndarray) -> np.ndarray:
    """Map float32 to uint32 with the same order, -0 below 0, as the library orders them."""
    bits = scores.view(np.uint32)
    ranks: np.ndarray = np.where(bits >> 31, ~bits, bits | np.uint32(2**31))
    return ranks
