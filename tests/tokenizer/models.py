"""SentencePiece models written by hand: a .model with these pieces and no others."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from fgpt.tokenizer.sentencepiece_proto import BYTE, CONTROL, NORMAL, UNKNOWN
from fgpt.tokenizer.spec import EOD

Piece = tuple[str, float, int]

UNIGRAM, BPE = 1, 2


def varint(number: int) -> bytes:
    """A protobuf's integer."""
    head = b""
    while number > 127:
        head += bytes([number & 127 | 128])
        number >>= 7
    return head + bytes([number])


def message(*fields: tuple[int, int | bytes | float]) -> bytes:
    """A protobuf message of (number, value)."""
    found = b""
    for number, value in fields:
        if isinstance(value, bytes):
            found += varint(number << 3 | 2) + varint(len(value)) + value
        elif isinstance(value, float):
            found += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            found += varint(number << 3) + varint(value)
    return found


def model(
    kind: int,
    pieces: Iterable[tuple[str, float]],
    others: Iterable[Piece] = (),
    *,
    has_bytes: bool = True,
    prefix: bool = False,
    extra: bool = False,
    suffix: bool = False,
    escape: bool = True,
) -> bytes:
    """The bytes of a .model: <unk>, the end of a document, bytes, NORMAL `pieces`, `others`."""
    all_pieces: list[Piece] = [("<unk>", 0.0, UNKNOWN), (EOD, 0.0, CONTROL)]
    if has_bytes:
        all_pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    all_pieces += [(piece, score, NORMAL) for piece, score in pieces]
    fields = [(1, message((1, p.encode()), (2, s), (3, t))) for p, s, t in (*all_pieces, *others)]
    trainer = message((3, kind), (24, int(suffix)), (35, int(has_bytes)))
    normalizer = message((1, b"identity"), (3, int(prefix)), (4, int(extra)), (5, int(escape)))
    return message(*fields, (2, trainer), (3, normalizer))
