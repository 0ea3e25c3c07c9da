"""A SentencePiece .model, encoded by the library `sentencepiece`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from fgpt.errors import DataError
from fgpt.tokenizer.base import Ids, Tokenizer, find_eod
from fgpt.tokenizer.spec import SpecialTokens

FILE_NAME = "tokenizer.model"
BLANK = "\u2581"
PieceType = ModelProto.SentencePiece
"""Has the types of pieces: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE."""


@dataclass(frozen=True)
class ModelInfo:
    """A .model's pieces, and the settings that decide whether decoding restores a text."""

    kind: str
    """unigram, bpe, word or char."""
    pieces: tuple[str, ...]
    """Piece of each id."""
    types: tuple[int, ...]
    """PieceType of each id."""
    scores: tuple[float, ...]
    """Score of each id."""
    is_identity: bool
    """Text is not normalized, except that blanks become U+2581 and add_dummy_prefix may apply."""
    has_dummy_prefix: bool
    """A blank is put in front of a text (add_dummy_prefix)."""

    def ids_of_type(self, piece_type: int) -> dict[str, int]:
        """Return piece -> id of one type."""
        pairs = zip(self.pieces, self.types, strict=True)
        return {piece: i for i, (piece, kind) in enumerate(pairs) if kind == piece_type}


def read_model(raw: bytes) -> ModelInfo:
    """Parse a .model. Raises ValueError if it is damaged; the library accepts some such files."""
    try:
        proto = ModelProto.FromString(raw)
    except DecodeError as error:
        raise ValueError("its protobuf is damaged or truncated") from error
    pieces = tuple(entry.piece for entry in proto.pieces)
    types = tuple(entry.type for entry in proto.pieces)
    _check_pieces(pieces, types)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return ModelInfo(
        kind=TrainerSpec.ModelType.Name(trainer.model_type).lower(),
        pieces=pieces,
        types=types,
        scores=tuple(entry.score for entry in proto.pieces),
        is_identity=(
            not normalizer.precompiled_charsmap
            and normalizer.escape_whitespaces
            and not normalizer.remove_extra_whitespaces
            and not trainer.treat_whitespace_as_suffix
        ),
        has_dummy_prefix=normalizer.add_dummy_prefix,
    )


def _check_pieces(pieces: tuple[str, ...], types: tuple[int, ...]) -> None:
    if not pieces:
        raise ValueError("no pieces")
    if not all(isinstance(piece, str) for piece in pieces):  # protobuf returns bytes for these
        raise ValueError("a piece is not UTF-8")
    if len(set(pieces)) != len(pieces) or "" in pieces:
        raise ValueError("an empty or a duplicate piece")
    if types.count(PieceType.UNKNOWN) != 1:
        raise ValueError(f"{types.count(PieceType.UNKNOWN)} unknown pieces, 1 is expected")
    expected = {f"<0x{byte:02X}>" for byte in range(256)}
    byte_pieces = {p for p, kind in zip(pieces, types, strict=True) if kind == PieceType.BYTE}
    if byte_pieces and byte_pieces != expected:
        raise ValueError(f"{len(byte_pieces)} byte pieces, none or 256 are expected")


class SentencePieceTokenizer(Tokenizer):
    """A .model in memory."""

    file_name = FILE_NAME
    library_name = "sentencepiece"

    def __init__(
        self, raw: bytes, where: str, special_tokens: SpecialTokens = "text", eod: str | None = None
    ):
        """Parse a .model; `where` starts error messages (DataError)."""
        super().__init__(raw, special_tokens)
        try:
            info = read_model(raw)
            self._backend = SentencePieceProcessor(model_proto=raw)
        except Exception as error:
            raise DataError(f"{where}: not a SentencePiece model ({error})") from error
        self.info = info
        self.kind = f"sentencepiece-{info.kind}"
        self.vocab_size = len(info.pieces)
        control = info.ids_of_type(PieceType.CONTROL)
        user_defined = info.ids_of_type(PieceType.USER_DEFINED)
        byte_pieces = info.ids_of_type(PieceType.BYTE)
        self.unk_id = self._backend.unk_id()
        end = self._backend.eos_id()  # -1: the model declares none
        if (
            eod is None
            and (control | user_defined).get(self._backend.id_to_piece(max(end, 0))) == end
        ):
            eod = self._backend.id_to_piece(end)
        self.eod, self.eod_id = find_eod(eod, (control | user_defined).get, where)
        self.byte_ids = frozenset(byte_pieces.values())
        self.added_tokens = (*control, *user_defined)
        self._control = {i: name for name, i in control.items()} | {self.eod_id: self.eod}
        if special_tokens == "control":
            self.literals |= {name.encode(): [i] for i, name in self._control.items()}
        else:
            self.encode_names_as_text({self.eod: self.eod_id}, where)
        # The library encodes U+2581 in a text like a blank. Where nothing else is normalized,
        # encode it as its three bytes, so that decoding restores every text.
        is_lossless = info.is_identity and not info.has_dummy_prefix and BLANK in info.pieces
        if is_lossless and byte_pieces:
            raw_blank = BLANK.encode()
            self.literals[raw_blank] = [byte_pieces[f"<0x{byte:02X}>"] for byte in raw_blank]

    def encode_with_library(self, texts: list[bytes]) -> Ids:
        """Encode with `sentencepiece` on the calling thread; never gives control ids."""
        ids = self._backend.encode_as_numpy(texts, num_threads=1)
        lengths = np.array([len(some) for some in ids], dtype=np.int64)
        return np.concatenate(ids).astype(np.uint32), lengths

    def id_to_token(self, i: int) -> str:
        """Return the piece of id `i`, with U+2581 for a blank and <0xNN> for a byte."""
        return self._backend.id_to_piece(i) if 0 <= i < self.vocab_size else ""

    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 bytes of a piece, with a blank for U+2581; one byte for a byte piece."""
        piece = self.id_to_token(i)
        if i in self.byte_ids:
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(BLANK, " ").encode()

    def _decode(self, ids: list[int]) -> str:
        """Decode with control pieces as their names; the library would drop them."""
        texts = []
        for is_control, run in groupby(ids, self._control.__contains__):
            if is_control:
                texts += [self._control[i] for i in run]
            else:
                texts.append(self._backend.decode(list(run)))
        return "".join(texts)
