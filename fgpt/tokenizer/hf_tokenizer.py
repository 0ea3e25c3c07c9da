"""A tokenizer.json, by the library `tokenizers`.

Text is data: a document that contains "<|endoftext|>" gets the ids of those characters, never the
end-of-document id, unless special tokens are asked for (special_tokens = control).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from fgpt.errors import DataError
from fgpt.tokenizer.base import Ids, Tokenizer, find_eod
from fgpt.tokenizer.spec import SpecialTokens

FILE_NAME = "tokenizer.json"


# ByteLevel writes a byte that is a printable character of Latin-1 as that character, the others as
# the letters from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class JsonTokenizer(Tokenizer):
    """A tokenizer.json in memory."""

    file_name = FILE_NAME
    library_name = "tokenizers"

    def __init__(
        self, raw: bytes, where: str, special_tokens: SpecialTokens = "text", eod: str | None = None
    ):
        """Read the bytes of a tokenizer.json; `where` is named in errors (DataError)."""
        super().__init__(raw, special_tokens)
        try:
            self._backend = Backend.from_buffer(raw)
            self.settings: dict[str, Any] = json.loads(raw)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where}: not a tokenizer.json ({error})") from error
        _refuse_chance(self.settings, where)
        # None of these three is part of what a document means; the first is not even saved.
        self._backend.encode_special_tokens = special_tokens == "text"
        self._backend.no_truncation()
        self._backend.no_padding()
        self.eod, self.eod_id = find_eod(eod, self._backend.token_to_id, where)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        model = self.settings["model"]
        self.kind = model.get("type") or "BPE"
        self.unk_id = _unknown(model, self._backend)
        self.byte_ids = _byte_ids(model, self._backend)
        self._spells_bytes = '"ByteLevel"' in json.dumps(self.settings.get("decoder"))
        added = self._backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.names = tuple(token.content for token in added.values())
        if special_tokens == "text":
            special = {token.content: i for i, token in added.items() if token.special}
            special = {name: i for name, i in special.items() if i != self.unk_id}
            self.keep_as_text({self.eod: self.eod_id} | special, where)

    def library(self, texts: list[bytes]) -> Ids:
        """Encode with `tokenizers`, over its threads."""
        encodings = self._backend.encode_batch_fast(
            [text.decode() for text in texts], add_special_tokens=False
        )
        found = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(found), np.array([len(ids) for ids in found], dtype=np.int64)

    def token(self, i: int) -> str:
        """The vocabulary's own spelling of id `i` (bytes as printable letters)."""
        return self._backend.id_to_token(i) or ""

    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes of a token, perhaps a part of a character."""
        token = self.token(i)
        if i in self.byte_ids:
            return bytes([int(token[1:-1], 16)])
        if self._spells_bytes and i not in self._added_ids:
            if all(letter in _BYTE_OF for letter in token):
                return bytes(_BYTE_OF[letter] for letter in token)
        return token.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _unknown(model: dict[str, Any], backend: Backend) -> int | None:
    if isinstance(model.get("unk_id"), int):  # Unigram has an id, the others a token
        return model["unk_id"]
    return backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def _byte_ids(model: dict[str, Any], backend: Backend) -> frozenset[int]:
    """Ids of <0x00> .. <0xFF> where the model falls back on them."""
    if not model.get("byte_fallback"):
        return frozenset()
    found = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in found if i is not None)


def _refuse_chance(settings: dict[str, Any], where: str) -> None:
    if (settings.get("model") or {}).get("dropout"):
        what = f"model.dropout is {settings['model']['dropout']}: ids would be drawn by chance"
        raise DataError(f"{where}: {what}; set it to null")
