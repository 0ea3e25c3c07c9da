"""A SentencePiece .model, by the library `sentencepiece`.

Control pieces never come out of a text, unless special tokens are asked for. The library writes a
blank as U+2581 and cannot tell the two apart. Where a model changes nothing else and has pieces for
bytes, U+2581 in a text becomes its three bytes, so that decode(encode(text)) == text.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np
from sentencepiece import SentencePieceProcessor

from fgpt.errors import DataError
from fgpt.tokenizer import sentencepiece_proto
from fgpt.tokenizer.base import Ids, Tokenizer, find_eod
from fgpt.tokenizer.sentencepiece_proto import ModelFacts
from fgpt.tokenizer.spec import SpecialTokens

FILE_NAME = "tokenizer.model"
BLANK = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A .model in memory."""

    file_name = FILE_NAME
    library_name = "sentencepiece"

    def __init__(
        self,
        raw: bytes,
        where: str,
        special_tokens: SpecialTokens = "text",
        eod: str | None = None,
        facts: ModelFacts | None = None,
    ):
        """Read the bytes of a .model; `where` is named in errors (DataError); `facts`: what
        `read_model` said of these bytes before.
        """
        super().__init__(raw, special_tokens)
        try:
            facts = facts or sentencepiece_proto.read_model(raw)
            self._backend = SentencePieceProcessor(model_proto=raw)
        except Exception as error:
            raise DataError(f"{where}: not a SentencePiece model ({error})") from error
        self.facts = facts
        self.kind = f"sentencepiece-{facts.kind}"
        self.vocab_size = len(facts.pieces)
        control = facts.of_type(sentencepiece_proto.CONTROL)
        users = facts.of_type(sentencepiece_proto.USER_DEFINED)
        self.unk_id = self._backend.unk_id()
        self.eod, self.eod_id = find_eod(eod, (control | users).get, where)
        self.byte_ids = frozenset(facts.of_type(sentencepiece_proto.BYTE).values())
        self.names = (*control, *users)
        self._control = {i: name for name, i in control.items()} | {self.eod_id: self.eod}
        if special_tokens == "control":
            self.literals |= {name.encode(): [i] for i, name in self._control.items()}
        else:
            self.keep_as_text({self.eod: self.eod_id}, where)
        if facts.keeps_text and self.byte_ids:
            pieces = facts.of_type(sentencepiece_proto.BYTE)
            raw_blank = BLANK.encode()
            self.literals[raw_blank] = [pieces[f"<0x{byte:02X}>"] for byte in raw_blank]

    def library(self, texts: list[bytes]) -> Ids:
        """Encode with `sentencepiece`, on this thread."""
        found = self._backend.encode_as_numpy(texts, num_threads=1)
        lengths = np.array([len(ids) for ids in found], dtype=np.int64)
        return np.concatenate(found).astype(np.uint32), lengths

    def token(self, i: int) -> str:
        """The piece of id `i`, with U+2581 for a blank and <0xNN> for a byte."""
        return self._backend.id_to_piece(i) if 0 <= i < self.vocab_size else ""

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes of a piece, with a blank for U+2581; the byte of a piece for one."""
        piece = self.token(i)
        return (
            bytes([int(piece[1:-1], 16)])
            if i in self.byte_ids
            else piece.replace(BLANK, " ").encode()
        )

    def _decode(self, ids: list[int]) -> str:
        """The library leaves control pieces out; here they show as their names."""
        parts = []
        for is_control, run in groupby(ids, self._control.__contains__):
            if is_control:
                parts += [self._control[i] for i in run]
            else:
                parts.append(self._backend.decode(list(run)))
        return "".join(parts)
