"""The face of a tokenizer, and the one way a text goes through it.

1. `pieces` cuts a text longer than PIECE_BYTES: memory stays bounded, no token crosses a cut;
2. `Tokenizer.literals` (bytes that stand for fixed ids) are taken out;
3. `Tokenizer.library` encodes the rest, a batch of at most BATCH_BYTES at a time.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path

import numpy as np

from fgpt.errors import DataError
from fgpt.tokenizer.spec import EOD, SpecialTokens
from fgpt.utils.files import write_atomic

PIECE_BYTES = 2**20
BATCH_BYTES = 2**23
EOD_NAMES = (EOD, "</s>", "<|end_of_text|>", "<eos>")

Ids = tuple[np.ndarray, np.ndarray]
"""All ids end to end, uint32 [sum of lengths], and the number of each text, int64 [texts]."""
Library = Callable[[list[bytes]], Ids]
"""UTF-8 texts -> ids, by the library itself."""


class Tokenizer(ABC):
    """Text <-> ids. Immutable: `fingerprint` names it for good."""

    file_name: str
    """Name of its file in a data set: tokenizer.json or tokenizer.model."""
    library_name: str
    """Name of the library that encodes: tokenizers or sentencepiece."""
    vocab_size: int
    """Largest id + 1: the rows an embedding needs."""
    eod_id: int
    """Id that ends every document."""
    eod: str
    """Its name."""
    kind: str
    """The model behind it, such as BPE or sentencepiece-unigram."""
    names: tuple[str, ...]
    """Names of its special, added, control and user-defined tokens."""
    unk_id: int | None = None
    """Id of what the vocabulary cannot express, if there is one."""
    byte_ids: frozenset[int] = frozenset()
    """Ids that stand for one byte of a character which is not in the vocabulary."""

    def __init__(self, raw: bytes, special_tokens: SpecialTokens):
        self.raw = raw
        """The bytes of its file."""
        self.special_tokens = special_tokens
        """Whether the name of a special token in a text is text or control."""
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        """SHA-256 of the file's bytes."""
        self.literals: dict[bytes, list[int]] = {}
        """UTF-8 bytes that are not given to the library: they become these ids."""

    @abstractmethod
    def library(self, texts: list[bytes]) -> Ids:
        """Encode with the tokenizer's own library; no special ids are added."""

    @abstractmethod
    def token(self, i: int) -> str:
        """The vocabulary's own spelling of id `i`; "" if there is none."""

    @abstractmethod
    def token_bytes(self, i: int) -> bytes:
        """The UTF-8 bytes that id `i` stands for, perhaps a part of a character."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Text of ids that are in range."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [number of tokens]; no special ids are added.

        Raises DataError for text that has no UTF-8 (a lone surrogate).
        """
        try:
            raw = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise DataError(f"text cannot be encoded as UTF-8 ({error})") from error
        ids, lengths = encode_with(self.library, raw, self.literals)
        return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1]) if texts else []

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
        return self._decode(plain)

    def keep_as_text(self, special: Mapping[str, int], where: str) -> None:
        """See to it that the names of these ids, in a text, do not become these ids.

        Where the library would make them so, a name is cut after its first character.
        Raises DataError if that does not help.
        """
        forbidden = set(special.values())
        for name, i in special.items():
            if i not in self.encode(f"a{name} {name}"):
                continue
            ids = [*self.encode(name[0]), *self.encode(name[1:])]
            if forbidden.intersection(ids):
                what = f'the text "{name}" in a document would become that special token'
                raise DataError(f"{where}: {what}; set tokenizer.special_tokens to control")
            self.literals[name.encode()] = ids

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's file (into `path` if that is a directory), durably."""
        file = Path(path)
        write_atomic(file / self.file_name if file.is_dir() else file, self.raw)


def find_eod(wanted: str | None, id_of: Callable[[str], int | None], where: str) -> tuple[str, int]:
    """Name and id of the token that ends a document: the one `wanted`, or the first usual name.

    Raises DataError naming the candidates.
    """
    names = (wanted,) if wanted else EOD_NAMES
    for name in names:
        found = id_of(name)
        if found is not None:
            return name, found
    missing = " or ".join(f'"{name}"' for name in names)
    fix = "name another with tokenizer.eod (--eod)"
    raise DataError(f"{where}: has no {missing} token, which must end every document; {fix}")


def pieces(text: bytes, size: int = PIECE_BYTES) -> Iterator[bytes]:
    """Cut UTF-8 bytes into pieces of at most `size` (>= 4) bytes, never inside a character."""
    start = 0
    while len(text) - start > size:
        end = start + size
        while text[end] & 0xC0 == 0x80:  # 10xxxxxx: inside a character
            end -= 1
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def encode_with(
    library: Library, texts: Sequence[bytes], literals: Mapping[bytes, Sequence[int]]
) -> Ids:
    """Encode UTF-8 texts: all ids end to end, uint32, and the length of each, int64 [texts]."""
    if not any(map(_is_cut, texts, repeat(literals))) and sum(map(len, texts)) <= BATCH_BYTES:
        return library(list(texts))
    pattern = _any_of(literals)
    parts: list[bytes] = []  # of all texts, in order
    counts = np.ones(len(texts), dtype=np.int64)  # parts of each text
    for i, text in enumerate(texts):
        if not _is_cut(text, literals):
            parts.append(text)
            continue
        before = len(parts)
        for piece in pieces(text):
            parts += pattern.split(piece) if pattern else (piece,)
        counts[i] = len(parts) - before
    ids, lengths = _encode_parts(library, parts, literals)
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum(counts)]
    return ids, np.diff(ends, prepend=0)


def _is_cut(text: bytes, literals: Mapping[bytes, Sequence[int]]) -> bool:
    """Whether a text does not go through the library as a whole."""
    if len(text) > PIECE_BYTES:
        return True
    is_ascii = text.isascii()  # ten times as fast as to look for one
    return any(literal in text for literal in literals if not is_ascii or literal.isascii())


def _any_of(literals: Mapping[bytes, Sequence[int]]) -> re.Pattern[bytes] | None:
    """A pattern whose `split` keeps the literals; the longest literal wins."""
    longest_first = sorted(literals, key=lambda literal: (-len(literal), literal))
    return re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")") if literals else None


def _encode_parts(
    library: Library, parts: list[bytes], literals: Mapping[bytes, Sequence[int]]
) -> Ids:
    """Ids of parts each of which is a literal, or has none in it."""
    found: list[Ids] = [(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int64))]
    batch: list[bytes] = []
    size = 0
    for part in parts:
        fixed = literals.get(part) if literals else None
        if batch and (fixed is not None or size + len(part) > BATCH_BYTES):
            found.append(library(batch))
            batch, size = [], 0
        if fixed is not None:
            found.append((np.array(fixed, dtype=np.uint32), np.array([len(fixed)])))
        else:
            batch.append(part)
            size += len(part)
    if batch:
        found.append(library(batch))
    return np.concatenate([ids for ids, _ in found]), np.concatenate([n for _, n in found])
