"""What a SentencePiece .model says of itself: enough of its protobuf, read strictly.

The library takes some damaged files for good ones; this is read before the library sees the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

# Field numbers of sentencepiece_model.proto.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TRAINER_TYPE, _TRAINER_SUFFIX = 3, 24
_NORMALIZER_CHARSMAP, _NORMALIZER_PREFIX, _NORMALIZER_EXTRA, _NORMALIZER_ESCAPE = 2, 3, 4, 5

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Value = int | bytes | float
"""Of a field: a number, text or a message, or a float."""
TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class ModelFacts:
    """A .model's pieces and the settings that decide whether text survives it."""

    kind: str
    """unigram, bpe, word or char."""
    pieces: tuple[str, ...]
    """Piece of each id."""
    types: tuple[int, ...]
    """Its type, such as CONTROL."""
    scores: tuple[float, ...]
    """Its score."""
    is_plain: bool
    """A text is changed in no way but that blanks become U+2581, and perhaps one is put in front:
    no character map, no blanks taken out."""
    has_prefix: bool
    """A blank is put in front of a text."""

    @property
    def keeps_text(self) -> bool:
        """Whether nothing is normalized, and the blank has a piece of its own."""
        return self.is_plain and not self.has_prefix and "\u2581" in self.pieces

    def of_type(self, wanted: int) -> dict[str, int]:
        """Piece -> id of one type."""
        pairs = zip(self.pieces, self.types, strict=True)
        return {piece: i for i, (piece, kind) in enumerate(pairs) if kind == wanted}


def read_model(raw: bytes) -> ModelFacts:
    """Read a .model. Raises ValueError saying what is wrong with it."""
    pieces, types, scores = [], [], []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    for number, value in _fields(raw):
        if number not in (_PIECE, _TRAINER, _NORMALIZER):
            continue
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        if number == _PIECE:
            piece = dict(_fields(value))
            pieces.append(_text(piece.get(_PIECE_TEXT, b"")).decode())  # may raise a ValueError
            types.append(_number(piece.get(_PIECE_TYPE, NORMAL)))
            scores.append(_score(piece.get(_PIECE_SCORE, 0.0)))
        else:  # one that comes twice is one message to protobuf
            (trainer if number == _TRAINER else normalizer).update(_fields(value))
    _check(pieces, types)
    is_plain = (
        not _text(normalizer.get(_NORMALIZER_CHARSMAP, b""))
        and bool(_number(normalizer.get(_NORMALIZER_ESCAPE, 1)))
        and not _number(normalizer.get(_NORMALIZER_EXTRA, 1))
        and not _number(trainer.get(_TRAINER_SUFFIX, 0))
    )
    has_prefix = bool(_number(normalizer.get(_NORMALIZER_PREFIX, 1)))
    kind = TYPES.get(_number(trainer.get(_TRAINER_TYPE, 1)))
    if kind is None:
        raise ValueError("unknown type of model")
    return ModelFacts(kind, tuple(pieces), tuple(types), tuple(scores), is_plain, has_prefix)


def _check(pieces: list[str], types: list[int]) -> None:
    if not pieces:
        raise ValueError("no pieces")
    if len(set(pieces)) != len(pieces) or "" in pieces:
        raise ValueError("an empty piece, or one twice")
    if not all(NORMAL <= kind <= BYTE for kind in types):
        raise ValueError("a piece of an unknown type")
    if types.count(UNKNOWN) != 1:
        raise ValueError(f"{types.count(UNKNOWN)} pieces for unknowns, 1 is expected")
    wanted = {f"<0x{byte:02X}>" for byte in range(256)}
    found = {piece for piece, kind in zip(pieces, types, strict=True) if kind == BYTE}
    if found and found != wanted:
        raise ValueError(f"{len(found)} pieces for bytes, none or 256 are expected")


def _fields(raw: bytes) -> Iterator[tuple[int, Value]]:
    """(field number, value) of a protobuf message."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(raw, at)
            yield key >> 3, number
            continue
        if wire == 2:
            size, at = _varint(raw, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"not a protobuf (wire type {wire} at byte {at})")
        if at + size > len(raw):
            raise ValueError(f"cut short: {size} bytes are said to follow byte {at} of {len(raw)}")
        value = raw[at : at + size]
        yield key >> 3, value if wire == 2 else struct.unpack("<f" if size == 4 else "<d", value)[0]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    if at < len(raw) and raw[at] < 128:  # nearly all
        return raw[at], at + 1
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(raw):
            raise ValueError(f"cut short at byte {at}")
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if not raw[at - 1] & 0x80:
            return value, at
    raise ValueError(f"not a protobuf (a number of more than 10 bytes before byte {at})")


def _text(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where text is expected")
    return value


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("text where a number is expected")
    return value


def _score(value: Value) -> float:
    if not isinstance(value, float):
        raise ValueError("a score that is no float")
    return value
