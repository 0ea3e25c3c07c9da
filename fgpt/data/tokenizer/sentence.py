"""A SentencePiece model, by the library `sentencepiece`.

Control pieces never come out of a text, unless special tokens are asked for.
"""

from __future__ import annotations

import numpy as np
from sentencepiece import SentencePieceProcessor

from fgpt.data.tokenizer.base import Ids, Tokenizer, find_eod
from fgpt.data.tokenizer.spec import SpecialTokens
from fgpt.errors import DataError

FILE_NAME = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A .model in memory."""

    file_name = FILE_NAME
    library_name = "sentencepiece"

    def __init__(
        self, raw: bytes, where: str, special_tokens: SpecialTokens = "text", eod: str | None = None
    ):
        """Read the bytes of a .model; `where` is named in errors (DataError)."""
        super().__init__(raw, special_tokens)
        try:
            self._backend = SentencePieceProcessor(model_proto=raw)
        except Exception as error:
            raise DataError(f"{where}: not a SentencePiece model ({error})") from error
        self.vocab_size = self._backend.get_piece_size()
        self.unk_id = self._backend.unk_id()
        self.eod, self.eod_id = find_eod(eod, self._id_of, where)
        every = range(self.vocab_size)
        self.byte_ids = frozenset(i for i in every if self._backend.is_byte(i))

    def library(self, texts: list[bytes]) -> Ids:
        """Encode with `sentencepiece`, on this thread."""
        found = self._backend.encode_as_numpy(texts, num_threads=1)
        lengths = np.array([len(ids) for ids in found], dtype=np.int64)
        return np.concatenate(found).astype(np.uint32), lengths

    def token(self, i: int) -> str:
        """The piece of id `i`, with U+2581 for a blank and <0xNN> for a byte."""
        return self._backend.id_to_piece(i) if 0 <= i < self.vocab_size else ""

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids)

    def _id_of(self, piece: str) -> int | None:
        i = self._backend.piece_to_id(piece)
        return i if i != self.unk_id or piece == self.token(i) else None
