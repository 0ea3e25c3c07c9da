"""A tokenizer.json, encoded by Hugging Face's library `tokenizers`."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from fgpt.errors import DataError
from fgpt.tokenizer.base import Ids, Tokenizer, find_eod
from fgpt.tokenizer.spec import SpecialTokens

FILE_NAME = "tokenizer.json"

# ByteLevel (GPT-2's bytes_to_unicode) spells a printable Latin-1 byte as that character, and the
# other bytes as the characters from U+0100 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class HFTokenizer(Tokenizer):
    """A tokenizer.json in memory."""

    file_name = FILE_NAME
    library_name = "tokenizers"

    def __init__(
        self, raw: bytes, where: str, special_tokens: SpecialTokens = "text", eod: str | None = None
    ):
        """Parse a tokenizer.json; `where` starts error messages (DataError)."""
        super().__init__(raw, special_tokens)
        try:
            self._backend = Backend.from_buffer(raw)
            self.settings: dict[str, Any] = json.loads(raw)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where}: not a tokenizer.json ({error})") from error
        model = self.settings.get("model") or {}
        if model.get("dropout"):
            problem = f"model.dropout is {model['dropout']}: encoding would be random"
            raise DataError(f"{where}: {problem}; set it to null")
        # a file may set truncation and padding; encode_special_tokens is not stored in files
        self._backend.encode_special_tokens = special_tokens == "text"
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()
        declared = {token.content: i for i, token in added.items() if token.special}
        self.eod, self.eod_id = find_eod(eod, self._backend.token_to_id, where, declared.get)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.kind = model.get("type") or "BPE"
        self.unk_id = _unknown_id(model, self._backend)
        self.byte_ids = _byte_ids(model, self._backend)
        self._is_byte_level = '"ByteLevel"' in json.dumps(self.settings.get("decoder"))
        self._added_ids = frozenset(added)
        self.added_tokens = tuple(token.content for token in added.values())
        if special_tokens == "text":
            special = {name: i for name, i in declared.items() if i != self.unk_id}
            self.encode_names_as_text({self.eod: self.eod_id} | special, where)

    @property
    def template_prefix(self) -> tuple[int, ...]:
        """The ids that the file's post-processor puts in front of a text."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(i for i, _ in takewhile(lambda pair: pair[1] == 1, marked))

    def encode_with_library(self, texts: list[bytes]) -> Ids:
        """Encode with `tokenizers`, which uses its own threads."""
        encodings = self._backend.encode_batch_fast(
            [text.decode() for text in texts], add_special_tokens=False
        )
        ids = [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]
        return np.concatenate(ids), np.array([len(some) for some in ids], dtype=np.int64)

    def id_to_token(self, i: int) -> str:
        """Return the token of id `i`; byte-level BPE spells bytes as printable characters."""
        return self._backend.id_to_token(i) or ""

    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 bytes of a token; they may be part of a character."""
        token = self.id_to_token(i)
        if i in self.byte_ids:
            return bytes([int(token[1:-1], 16)])
        if self._is_byte_level and i not in self._added_ids:
            if all(character in _BYTE_OF for character in token):
                return bytes(_BYTE_OF[character] for character in token)
        return token.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _unknown_id(model: dict[str, Any], backend: Backend) -> int | None:
    if isinstance(model.get("unk_id"), int):  # Unigram stores an id, the others a token
        return model["unk_id"]
    return backend.token_to_id(model["unk_token"]) if model.get("unk_token") else None


def _byte_ids(model: dict[str, Any], backend: Backend) -> frozenset[int]:
    """Return the ids of <0x00> .. <0xFF> if the model has byte fallback."""
    if not model.get("byte_fallback"):
        return frozenset()
    ids = (backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(i for i in ids if i is not None)
