"""SentencePiece models with given pieces, without training."""

from __future__ import annotations

from collections.abc import Iterable

from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec

from fgpt.tokenizer.sentencepiece_model import PieceType
from fgpt.tokenizer.spec import EOD

Piece = tuple[str, float, int]

UNIGRAM, BPE, WORD = 1, 2, 3


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
    """Return a .model with <unk>, EOD, byte pieces, NORMAL `pieces` (piece, score) and `others`."""
    all_pieces: list[Piece] = [("<unk>", 0.0, PieceType.UNKNOWN), (EOD, 0.0, PieceType.CONTROL)]
    if has_bytes:
        all_pieces += [(f"<0x{byte:02X}>", 0.0, PieceType.BYTE) for byte in range(256)]
    all_pieces += [(piece, score, PieceType.NORMAL) for piece, score in pieces]
    proto = ModelProto(
        pieces=[PieceType(piece=p, score=s, type=t) for p, s, t in (*all_pieces, *others)],
        trainer_spec=TrainerSpec(
            model_type=kind, treat_whitespace_as_suffix=suffix, byte_fallback=has_bytes
        ),
        normalizer_spec=NormalizerSpec(
            name="identity",
            add_dummy_prefix=prefix,
            remove_extra_whitespaces=extra,
            escape_whitespaces=escape,
        ),
    )
    return proto.SerializeToString()
