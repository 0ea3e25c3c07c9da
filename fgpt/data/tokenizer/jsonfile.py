"""A tokenizer.json, by the library `tokenizers`.

Text is data: a document that contains "<|endoftext|>" gets the ids of those characters, never the
end-of-document id, unless special tokens are asked for (special_tokens = control).
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend

from fgpt.data.tokenizer.base import Ids, Tokenizer, find_eod
from fgpt.data.tokenizer.spec import SpecialTokens
from fgpt.errors import DataError

FILE_NAME = "tokenizer.json"


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
        self.unk_id = self._backend.token_to_id(model.get("unk_token") or "")
        if special_tokens == "text" and self.eod_id in self.encode(f"a{self.eod} {self.eod}"):
            what = f'the text "{self.eod}" in a document would be the end of the document'
            fix = "name another token with tokenizer.eod, or set tokenizer.special_tokens control"
            raise DataError(f"{where}: {what}; {fix}")

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

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)


def _refuse_chance(settings: dict[str, Any], where: str) -> None:
    if (settings.get("model") or {}).get("dropout"):
        what = f"model.dropout is {settings['model']['dropout']}: ids would be drawn by chance"
        raise DataError(f"{where}: {what}; set it to null")
