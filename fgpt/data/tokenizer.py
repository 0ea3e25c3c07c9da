"""Text <-> token ids: the one face the rest of FGPT sees, over the `tokenizers` library.

Byte-level BPE: any text can be encoded, and decode(encode(text)) == text. Text is data: a document
that contains "<|endoftext|>" gets the ids of those characters, never the end-of-document id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from fgpt.data.files import write_durably
from fgpt.errors import DataError

EOD = "<|endoftext|>"
MIN_VOCAB = 257
FILE_NAME = "tokenizer.json"

# A run of this many letters is no word. It would teach the vocabulary nothing, and BPE training
# takes time (length of a word) x (number of merges): hours for a line of 50 MB.
_NO_WORD = re.compile(r"\w{1000,}")


class Tokenizer:
    """A tokenizer.json in memory. Immutable: `fingerprint` names it for good."""

    def __init__(self, raw: bytes, where: str):
        """Read the bytes of a tokenizer.json; `where` is named in errors (DataError)."""
        try:
            self._backend = Backend.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{where}: not a tokenizer.json ({error})") from error
        # None of these three is part of what a document means; the first is not even saved.
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()
        self._raw = raw
        eod = self._backend.token_to_id(EOD)
        if eod is None:
            raise DataError(f'{where}: has no "{EOD}" token, which must end every document')
        self.eod_id: int = eod
        """Id that ends every document."""
        self.vocab_size: int = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        """Largest id + 1: the rows an embedding needs."""
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        """SHA-256 of the file's bytes."""

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a tokenizer.json, or the one in a directory. Raises DataError."""
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        try:
            return cls(file.read_bytes(), str(file))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a byte-level BPE of at most `vocab_size` ids (fewer if the text has no more pairs).

        The same texts in the same order give the same bytes, for any number of threads.
        """
        if vocab_size < MIN_VOCAB:
            what = f"{vocab_size} is too small; 256 bytes and {EOD} need {MIN_VOCAB}"
            raise DataError(f"tokenizer.vocab_size: {what}")
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((_NO_WORD.sub(" ", text) for text in texts), trainer)
        return cls(backend.to_str().encode(), "new tokenizer")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [number of tokens]; no special ids are added."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"text cannot be encoded as UTF-8 ({error})") from error
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        """Ids of one text; no special ids are added."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; the eod id shows as its name. Raises DataError for an id out of range."""
        plain = [int(i) for i in ids]
        for i in plain:
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"token id {i} is outside this tokenizer's 0..{self.vocab_size - 1}"
                )
        return self._backend.decode(plain, skip_special_tokens=False)

    def token(self, i: int) -> str:
        """The vocabulary's own spelling of id `i` (bytes as printable letters)."""
        return self._backend.id_to_token(i) or ""

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json (into `path` if that is a directory), durably."""
        file = Path(path)
        write_durably(file / FILE_NAME if file.is_dir() else file, self._raw)


def pieces(text: str, size: int = 2**20) -> Iterator[str]:
    """Cut a text into pieces of at most `size` characters, encoded one by one.

    Bounds the encoder's memory and lets threads share a long document; a token never crosses a cut.
    """
    for start in range(0, len(text), size):
        yield text[start : start + size]
