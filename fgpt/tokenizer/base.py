"""The Tokenizer interface, and how long texts and batches are encoded.

1. `split_text` splits texts longer than MAX_CHUNK_BYTES, which bounds memory; no token crosses a
   split.
2. `Tokenizer.literals`, byte strings with fixed ids, are separated from the rest.
3. The library or a fast encoder encodes the rest, in batches of at most BATCH_BYTES.
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

MAX_CHUNK_BYTES = 2**20
BATCH_BYTES = 2**23
EOD_NAMES = (EOD, "</s>", "<|end_of_text|>", "<eos>")

Ids = tuple[np.ndarray, np.ndarray]
"""Ids of several texts, concatenated, uint32 [total]; number of ids of each, int64 [texts]."""
EncodeFunction = Callable[[list[bytes]], Ids]
"""UTF-8 texts -> ids."""


class Tokenizer(ABC):
    """Text <-> ids. Immutable; `fingerprint` identifies it."""

    file_name: str
    """Name of its file in a data set: tokenizer.json or tokenizer.model."""
    library_name: str
    """The library that encodes: tokenizers or sentencepiece."""
    vocab_size: int
    """Largest id + 1: the number of embedding rows needed."""
    eod_id: int
    """Id of the end-of-document token, which ends every document."""
    eod: str
    """Name of the end-of-document token."""
    kind: str
    """Model type, such as BPE or sentencepiece-unigram."""
    added_tokens: tuple[str, ...]
    """Names of the special, added, control and user-defined tokens."""
    unk_id: int | None = None
    """Id of the unknown token, if there is one."""
    byte_ids: frozenset[int] = frozenset()
    """Ids of the byte-fallback tokens."""
    prompt_prefix: tuple[int, ...] = ()
    """Ids that the model has in front of every text, such as Llama's BOS; only `encode_prompt` adds
    them. The loader sets it: it is a property of the model, more than of the file."""

    def __init__(self, raw: bytes, special_tokens: SpecialTokens):
        self.raw = raw
        """Content of its file."""
        self.special_tokens = special_tokens
        """Whether the name of a special token in a text is encoded as text or as the token."""
        self.fingerprint: str = hashlib.sha256(raw).hexdigest()
        """SHA-256 of `raw`."""
        self.literals: dict[bytes, list[int]] = {}
        """UTF-8 strings that bypass the library: each is encoded as these ids."""

    @abstractmethod
    def encode_with_library(self, texts: list[bytes]) -> Ids:
        """Encode UTF-8 texts with the tokenizer's own library, without adding special ids."""

    @abstractmethod
    def id_to_token(self, i: int) -> str:
        """Return the token of id `i` as the vocabulary spells it; "" if there is none."""

    @abstractmethod
    def token_bytes(self, i: int) -> bytes:
        """Return the UTF-8 bytes that id `i` stands for; they may be part of a character."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Decode ids that are in range."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64 [tokens]; no special ids are added.

        Raises DataError for text that UTF-8 cannot represent (a lone surrogate).
        """
        try:
            raw = [text.encode() for text in texts]
        except UnicodeEncodeError as error:
            raise DataError(f"text cannot be encoded as UTF-8 ({error})") from error
        ids, lengths = encode_batched(self.encode_with_library, raw, self.literals)
        return split_ids(ids.astype(np.int64), lengths)

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text; no special ids are added."""
        return self.encode_batch([text])[0].tolist()

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that a model continues, at least one: `prompt_prefix` and those of the
        text, or the end of the document before.
        """
        return [*self.prompt_prefix, *self.encode(text)] or [self.eod_id]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of `ids`; eod becomes its name. Raises DataError for ids out of range."""
        checked = [int(i) for i in ids]
        for i in checked:
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"token id {i} is outside this tokenizer's 0..{self.vocab_size - 1}"
                )
        return self._decode(checked)

    def encode_names_as_text(self, special: Mapping[str, int], where: str) -> None:
        """Make sure that the name of a special token (name -> id) in a text is encoded as text.

        Where the library would encode a name as the token, the name becomes a literal, split after
        its first character. Raises DataError if that still gives a special id.
        """
        forbidden = set(special.values())
        for name, i in special.items():
            if i not in self.encode(f"a{name} {name}"):
                continue
            ids = [*self.encode(name[0]), *self.encode(name[1:])]
            if forbidden.intersection(ids):
                problem = f'the text "{name}" in a document would become that special token'
                raise DataError(f"{where}: {problem}; set tokenizer.special_tokens to control")
            self.literals[name.encode()] = ids

    def save(self, path: str | Path) -> None:
        """Write the tokenizer's file durably; under `file_name` if `path` is a directory."""
        file = Path(path)
        write_atomic(file / self.file_name if file.is_dir() else file, self.raw)


def find_eod(
    eod: str | None,
    id_of: Callable[[str], int | None],
    where: str,
    declared: Callable[[str], int | None] | None = None,
) -> tuple[str, int]:
    """Return name and id of the end-of-document token: `eod`, or the first of EOD_NAMES.

    `declared` finds ids among the tokens that the file declares as special: they come before learnt
    pieces of the same name. Raises DataError if the vocabulary has none of the names.
    """
    names = (eod,) if eod else EOD_NAMES
    for find in (declared, id_of) if declared else (id_of,):
        for name in names:
            i = find(name)
            if i is not None:
                return name, i
    missing = " or ".join(f'"{name}"' for name in names)
    remedy = "name another with tokenizer.eod (--eod)"
    raise DataError(f"{where}: has no {missing} token, which must end every document; {remedy}")


def split_ids(ids: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Return the ids of each text of an `Ids` pair."""
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def split_text(text: bytes, max_bytes: int = MAX_CHUNK_BYTES) -> Iterator[bytes]:
    """Split UTF-8 text into chunks of at most `max_bytes` (>= 4), between characters."""
    start = 0
    while len(text) - start > max_bytes:
        end = start + max_bytes
        while text[end] & 0xC0 == 0x80:  # 10xxxxxx: inside a character
            end -= 1
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def encode_batched(
    encode: EncodeFunction, texts: Sequence[bytes], literals: Mapping[bytes, Sequence[int]]
) -> Ids:
    """Encode UTF-8 texts of any length in batches; `literals` are replaced by their ids."""
    if not any(map(_needs_split, texts, repeat(literals))) and sum(map(len, texts)) <= BATCH_BYTES:
        return encode(list(texts))
    # 1. split texts into chunks, and those at the literals; the longest literal wins
    longest_first = sorted(literals, key=lambda literal: (-len(literal), literal))
    pattern = re.compile(b"(" + b"|".join(map(re.escape, longest_first)) + b")")
    segments: list[bytes] = []  # of all texts, in order
    counts = np.ones(len(texts), dtype=np.int64)  # segments of each text
    for i, text in enumerate(texts):
        if not _needs_split(text, literals):
            segments.append(text)
            continue
        before = len(segments)
        for chunk in split_text(text):
            segments += pattern.split(chunk) if literals else (chunk,)
        counts[i] = len(segments) - before
    # 2. encode the segments
    ids, lengths = _encode_segments(encode, segments, literals)
    # 3. add up the lengths of each text
    ends = np.concatenate([[0], np.cumsum(lengths)])[np.cumsum(counts)]
    return ids, np.diff(ends, prepend=0)


def _needs_split(text: bytes, literals: Mapping[bytes, Sequence[int]]) -> bool:
    """Return whether a text is too long or contains a literal."""
    if len(text) > MAX_CHUNK_BYTES:
        return True
    is_ascii = text.isascii()  # ten times as fast as searching for a literal
    return any(literal in text for literal in literals if not is_ascii or literal.isascii())


def _encode_segments(
    encode: EncodeFunction, segments: list[bytes], literals: Mapping[bytes, Sequence[int]]
) -> Ids:
    """Encode segments each of which is a literal or contains none, in batches."""
    results: list[Ids] = [(np.zeros(0, dtype=np.uint32), np.zeros(0, dtype=np.int64))]
    batch: list[bytes] = []
    size = 0
    for segment in segments:
        fixed_ids = literals.get(segment) if literals else None
        if batch and (fixed_ids is not None or size + len(segment) > BATCH_BYTES):
            results.append(encode(batch))
            batch, size = [], 0
        if fixed_ids is not None:
            results.append((np.array(fixed_ids, dtype=np.uint32), np.array([len(fixed_ids)])))
        else:
            batch.append(segment)
            size += len(segment)
    if batch:
        results.append(encode(batch))
    return np.concatenate([ids for ids, _ in results]), np.concatenate([n for _, n in results])
