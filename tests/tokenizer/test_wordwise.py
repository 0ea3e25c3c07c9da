"""wordwise has the ids of sentencepiece, also where float32 rounding decides."""

from __future__ import annotations

import ast
import gc
import math
import random
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from fgpt.tokenizer.base import Tokenizer, split_ids
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.load import tokenizer_from_bytes
from fgpt.tokenizer.sentencepiece_model import PieceType, read_model
from fgpt.tokenizer.spec import Kind, TokenizerSpec
from fgpt.tokenizer.train import train_tokenizer
from fgpt.tokenizer.wordwise.encoder import Wordwise
from fgpt.utils.process import resident_bytes
from tests.tokenizer.chinese import documents
from tests.tokenizer.models import BPE, UNIGRAM, WORD, Piece, model
from tests.tokenizer.variants import TEXTS

BLANK = "\u2581"
CODE = Path(ast.__file__).read_text()


def read(raw: bytes) -> Tokenizer:
    return tokenizer_from_bytes(raw, "tokenizer.model", "made by hand")


def assert_equal_ids(raw: bytes, texts: Sequence[str]) -> None:
    """Compare all texts in one call, then one by one with a full cache."""
    library = SentencePieceProcessor(model_proto=raw)
    expected = [library.encode(text) for text in texts]
    fast = Wordwise(read(raw))
    ids, lengths = fast([text.encode() for text in texts])
    assert ids.dtype == np.uint32 and lengths.dtype == np.int64 and lengths.sum() == len(ids)
    assert [some.tolist() for some in split_ids(ids, lengths)] == expected
    for text, ids_of_text in zip(texts, expected, strict=True):
        assert fast([text.encode()])[0].tolist() == ids_of_text


KINDS: tuple[Kind, ...] = ("sentencepiece-unigram", "sentencepiece-bpe")


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_a_learned_model(kind: Kind) -> None:
    raw = train_tokenizer(TokenizerSpec(1000, kind=kind), [CODE, *TEXTS, *documents(30)]).raw
    cut = [CODE[i : i + 1 + i % 997] for i in range(0, len(CODE), 997)]
    own = [text for text in (*TEXTS, *documents(20, seed=5)) if BLANK not in text]
    odd = ["", "x" * 5000, " " * 700, "\0a\0", "\U0010ffff\u0080 \ud7ff", *own]
    assert_equal_ids(raw, [CODE, *cut, *odd])


ALPHABET = [*"ab1. \n", "\u00e9", "\u4e2d", "\u6587", "\U0001f600"]
STRING = st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=4).map("".join)
SCORE = st.sampled_from([-1.0, -1.5, -2.0, -2.5, -3.0, -4.5, -6.0, -1e-3, -0.0])
VOCABULARY = st.dictionaries(STRING, SCORE, min_size=1, max_size=25)
TEXT = st.lists(st.sampled_from([*ALPHABET, "z", "\u6211"]), max_size=60).map("".join)


@pytest.mark.parametrize("kind", [UNIGRAM, BPE])
@settings(max_examples=300, deadline=None)
@given(vocabulary=VOCABULARY, texts=st.lists(TEXT, min_size=1, max_size=4), prefix=st.booleans())
def test_any_vocabulary(
    kind: int, vocabulary: dict[str, float], texts: list[str], prefix: bool
) -> None:
    pieces = {piece.replace(" ", BLANK): score for piece, score in vocabulary.items()}
    raw = model(kind, ({BLANK: -5.0} | pieces).items(), prefix=prefix)
    assert_equal_ids(raw, [*texts, *([text + BLANK for text in texts] if prefix else [])])


def nearly_equal(seed: int) -> dict[str, float]:
    """Return pieces whose scores nearly equal the sums of their letters': rounding decides."""
    draw = random.Random(seed)
    letters = {letter: -draw.uniform(1, 9) for letter in (*"abc.", BLANK)}
    pieces = dict(letters)
    for size in (2, 2, 2, 3, 3, 3, 4, 4, 5, 9, 17):
        piece = "".join(draw.choices("abc.", k=size))
        little = draw.choice([0.0, 1e-7, -1e-6, 1e-5, -1e-4, 1e-3, -1e-2, 0.1])
        pieces[piece] = sum(letters[letter] for letter in piece) * (1 + little)
    return pieces


@pytest.mark.parametrize("seed", range(8))
def test_rounding_is_that_of_the_library(seed: int) -> None:
    """Sums often go below -100000, where the library resets them to 0."""
    draw = random.Random(seed)
    pieces = nearly_equal(seed)
    letters = draw.choice(["abc. ", "abbc  ", "ab"])
    text = "".join(draw.choices(letters, k=300_000))
    raw = model(UNIGRAM, pieces.items())
    library = SentencePieceProcessor(model_proto=raw)
    assert sum(map(library.get_score, library.encode(text))) < -300_000
    assert_equal_ids(raw, [text, letters * 5, text[:40], text[100:], text[-1000:]])


def test_rounding_matters_in_that_test() -> None:
    """The test above would prove nothing if words had the same ids alone as in their text."""
    differ = 0
    for seed in range(8):
        library = SentencePieceProcessor(model_proto=model(UNIGRAM, nearly_equal(seed).items()))
        words = random.Random(seed).choices([" abcab", " ca.b", " bbac.", " a.b.c."], k=9_000)
        differ += sum(library.encode(words), []) != library.encode("".join(words))
    assert differ >= 4


def test_sums_are_reset_inside_a_word() -> None:
    pieces = dict.fromkeys("abcd", -40_000.0) | {BLANK: -1.0, "abcd": -170_000.0}
    pieces |= {"x": -1.0, "y": -1.001, "xy": -2.0015}
    assert_equal_ids(model(UNIGRAM, pieces.items()), ["abcdxy", "xyabcdxyabcdxy abcdxy" * 9])


def test_positive_sums() -> None:
    """If the sums are reset at a position off the best path, that path continues above 0 (found in
    344 kB of C: from +19).
    """
    pieces = dict.fromkeys("abcd", -500.0) | {"abcd": -7.1, BLANK: -1.3}
    pieces |= {"xx": -3.3, "xxxxx": -5.7, "yyy": -2.9, "yyyyyyy": -9.1}
    text = " ".join(random.Random(0).choices(["abcd", "x" * 7, "y" * 10], k=50_000))
    assert_equal_ids(model(UNIGRAM, pieces.items()), [text, text[5:]])


def test_unknown_characters_add_to_the_sum() -> None:
    """Each costs 59, so their sums get as low as others, and they are cached."""
    pieces = nearly_equal(3) | {"q": -49.0}
    text = "".join(
        random.Random(3).choices(["\u4e2d", "\u00e9", "\U0001f600", "abc", ". "], k=50_000)
    )
    assert_equal_ids(model(UNIGRAM, pieces.items()), [text, text[5:], "\u4e2d" * 3000])


@pytest.mark.parametrize("scores", [(-0.0, 0.0), (0.0, -0.0), (1.0, 2.0), (-1.0, -1.0)])
def test_bpe_merges_the_best_and_of_equals_the_leftmost(scores: tuple[float, float]) -> None:
    ab, bc = scores
    pieces = {"a": -9.0, "b": -9.0, "c": -9.0, BLANK: -9.0, "ab": ab, "bc": bc, "abc": -3.0}
    texts = ["abc", "bcab", "abcabcab", "ababbcbc a bc", "cab" * 3000]
    assert_equal_ids(model(BPE, pieces.items()), texts)


REFUSED: dict[str, tuple[bytes, str]] = {
    "user-defined": (
        model(BPE, {BLANK: -1.0}.items(), [("ab", 0.0, PieceType.USER_DEFINED)]),
        "user-def",
    ),
    "unused": (model(BPE, {BLANK: -1.0}.items(), [("ab", 0.0, PieceType.UNUSED)]), "unused pieces"),
    "words": (model(WORD, {BLANK: -1.0}.items()), "its kind is word"),
    "extra blanks": (model(UNIGRAM, {BLANK: -1.0}.items(), extra=True), "it normalizes text"),
    "suffix": (model(UNIGRAM, {BLANK: -1.0}.items(), suffix=True), "it normalizes text"),
    "blanks": (model(UNIGRAM, {BLANK: -1.0}.items(), escape=False), "it normalizes text"),
    "no bytes": (model(UNIGRAM, {BLANK: -1.0}.items(), has_bytes=False), "no byte pieces"),
    "no blank": (model(UNIGRAM, {"a": -1.0}.items()), "blanks are not written as"),
    "a blank": (model(BPE, {BLANK: -1.0, "a b": -1.0}.items()), "blanks are not written as"),
    "positive": (model(UNIGRAM, {BLANK: -1.0, "a": 0.5}.items()), "scores outside"),
    "huge": (model(UNIGRAM, {BLANK: -1.0, "a": -3.4e38}.items()), r"scores outside -1e\+30"),
    "infinite": (model(BPE, {BLANK: -1.0, "a": -math.inf}.items()), "scores that are not finite"),
    "NUL": (model(BPE, {BLANK: -1.0, "\0": -1.0}.items()), "a piece for NUL"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_models_are_refused(name: str) -> None:
    raw, why = REFUSED[name]
    with pytest.raises(FastEncoderUnavailable, match=why):
        Wordwise(read(raw))


def test_a_tokenizer_of_another_library_is_refused() -> None:
    with pytest.raises(FastEncoderUnavailable, match="only SentencePiece models"):
        Wordwise(train_tokenizer(TokenizerSpec(300), [CODE]))


def test_it_is_freed_and_bounded() -> None:
    """New words replace old ones in the cache."""
    fast = Wordwise(read(model(UNIGRAM, {BLANK: -1.0, "a": -2.0}.items())))
    draw = random.Random(0)
    words = " ".join("".join(draw.choices("abcdefgh", k=12)) for _ in range(50_000)).encode()
    fast([words])
    before = resident_bytes()
    for i in range(20):
        fast([words.translate(bytes.maketrans(b"h", b"ijklmnopqrstuvwxyzAB"[i : i + 1]))])
    assert resident_bytes() - before < 16e6  # a million words of 12 bytes
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None


def test_model_info() -> None:
    others: list[Piece] = [("x", -0.25, PieceType.USER_DEFINED)]
    info = read_model(model(BPE, [("ab", -1.5), (BLANK, -2.0)], others, prefix=True))
    assert info.scores[-3:] == (-1.5, -2.0, -0.25) and len(info.scores) == len(info.pieces)
    assert info.is_identity and info.has_dummy_prefix


GOOD = model(BPE, [("ab", -1.5), (BLANK, -2.0)])


def test_a_message_that_comes_twice_is_one() -> None:
    """Protobuf merges them: fields missing in the second keep their values."""
    again = ModelProto(trainer_spec={"byte_fallback": True}, normalizer_spec={"name": "identity"})
    assert read_model(GOOD + again.SerializeToString()) == read_model(GOOD)


NEW = b"\x0a\x03new"  # field 1, the piece


@pytest.mark.parametrize(
    "message",
    [
        NEW + b"\x15\0\0\x80\xbf\x18\0",  # score -1, type 0, which does not exist
        NEW + b"\x15\0\0\x80\xbf\x18\x07",  # or 7
        NEW + b"\x12\x04\0\0\0\0",  # a score that is text
        NEW + b"\x10\x01",  # or an integer
    ],
)
def test_fields_are_read_as_the_library_reads_them(message: bytes) -> None:
    raw = GOOD + b"\x0a" + bytes([len(message)]) + message
    info, library = read_model(raw), SentencePieceProcessor(model_proto=raw)
    last = len(info.pieces) - 1
    assert info.pieces[last] == library.id_to_piece(last) == "new"
    assert info.scores[last] == library.get_score(last)
    assert info.types[last] == PieceType.NORMAL
    others = (library.is_unknown, library.is_control, library.is_unused, library.is_byte)
    assert not any(is_type(last) for is_type in others)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (GOOD[:-1], "its protobuf is damaged or truncated"),
        (GOOD + b"\x0f", "its protobuf is damaged or truncated"),
        (GOOD.replace(b"\x0a\x02ab", b"\x0a\x02\xff\xff"), "a piece is not UTF-8"),
        (GOOD + b"\x0a\x04\x0a\x02ab", "an empty or a duplicate piece"),
        (GOOD + b"\x0a\x02\x0a\0", "an empty or a duplicate piece"),
        (GOOD.replace(b"<0x41>", b"<0x4x>"), "256 byte pieces, none or 256 are expected"),
        (GOOD + b"\x0a\x07" + NEW + b"\x18\x02", "2 unknown pieces, 1 is expected"),
        (GOOD + b"\x0a\x07" + NEW + b"\x18\x06", "257 byte pieces, none or 256 are expected"),
    ],
)
def test_damaged_models_are_refused(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_model(raw)
