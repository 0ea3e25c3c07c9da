"""Choose the fastest encoder that gives the ids of the tokenizer's own library.

Candidates are `wordwise` (ours, in C) for SentencePiece models and `gigatoken` for BPE. A fast
encoder's ids are compared with the library's when it is chosen (on probes.py and a sample of the
corpus) and again on every task of a preparation (fgpt/prepare/verified_encoder.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

import numpy as np

from fgpt.errors import DataError
from fgpt.tokenizer.base import EncodeFunction, Ids, Tokenizer, encode_batched, split_ids
from fgpt.tokenizer.errors import FastEncoderUnavailable
from fgpt.tokenizer.load import tokenizer_from_bytes
from fgpt.tokenizer.probes import probe_texts
from fgpt.tokenizer.spec import SpecialTokens

if TYPE_CHECKING:
    from fgpt.tokenizer.gigatoken_encoder import Gigatoken
    from fgpt.tokenizer.wordwise.encoder import Wordwise

EncoderChoice = Literal["auto", "fast", "exact"]
FastEncoder = Literal["wordwise", "gigatoken"]
CANDIDATES: dict[str, tuple[FastEncoder, ...]] = {
    "sentencepiece": ("wordwise", "gigatoken"),
    "tokenizers": ("gigatoken",),
}
"""Library -> the encoders that may replace it, the fastest first."""


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder, in a form that can be pickled and sent to worker processes."""

    raw: bytes
    """Content of the tokenizer's file."""
    file_name: str
    """Its name: tokenizer.json or tokenizer.model."""
    special_tokens: SpecialTokens
    """Whether the name of a special token in a text is encoded as text or as the token."""
    eod: str
    """Name of the end-of-document token."""
    fast_encoder: FastEncoder | None = None
    """The encoder to use instead of the tokenizer's own library."""

    @property
    def is_fast(self) -> bool:
        """Whether a fast encoder replaces the tokenizer's own library."""
        return self.fast_encoder is not None

    @property
    def name(self) -> str:
        """Name of the fast encoder, with gigatoken's version; "" without one."""
        if self.fast_encoder == "gigatoken":
            return f"gigatoken {version('gigatoken')}"
        return self.fast_encoder or ""

    def build(self, tokenizer: Tokenizer | None = None) -> Encoder:
        """Create the encoder; `tokenizer`, if already loaded, saves parsing `raw`.

        Takes up to seconds for a large vocabulary. Raises FastEncoderUnavailable, or another
        DataError.
        """
        if tokenizer is None:
            name = self.file_name
            tokenizer = tokenizer_from_bytes(self.raw, name, name, self.special_tokens, self.eod)
        return Encoder(tokenizer, self)


class Encoder:
    """UTF-8 texts -> ids on the calling thread (`tokenizers` may use its own). Not thread-safe."""

    def __init__(self, tokenizer: Tokenizer, spec: EncoderSpec):
        """Raises FastEncoderUnavailable."""
        self._tokenizer = tokenizer
        self._name = spec.name or tokenizer.library_name
        self._encode: EncodeFunction = tokenizer.encode_with_library
        if spec.fast_encoder is not None:
            self._encode = _encoder_class(spec.fast_encoder)(tokenizer)

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """Return the ids of all texts, concatenated, uint32 [total], and the number of ids of each,
        int64 [texts]; no eod ids are added.

        Raises FastEncoderUnavailable if the fast encoder fails.
        """
        return encode_batched(self._encode, texts, self._tokenizer.literals)

    def find_mismatch(self, texts: Sequence[bytes]) -> str | None:
        """Compare with the ids of the tokenizer's library. Returns None, or a line that describes
        the first difference.
        """
        tokenizer = self._tokenizer
        ids, lengths = self.encode(texts)
        expected_ids, expected_lengths = encode_batched(
            tokenizer.encode_with_library, texts, tokenizer.literals
        )
        if np.array_equal(ids, expected_ids) and np.array_equal(lengths, expected_lengths):
            return None
        pairs = zip(split_ids(ids, lengths), split_ids(expected_ids, expected_lengths), strict=True)
        ours, theirs = next(pair for pair in pairs if not np.array_equal(*pair))
        shared = min(len(ours), len(theirs))
        unequal = np.flatnonzero(ours[:shared] != theirs[:shared])
        at = int(unequal[0]) if len(unequal) else shared
        context = tokenizer.decode(theirs[max(0, at - 3) : at + 3])
        return f"{self._name} gave other ids for a document, first at token {at}, near {context!r}"


def choose_encoder(
    tokenizer: Tokenizer,
    sample: Sequence[bytes],
    choice: EncoderChoice = "auto",
    on_candidate: Callable[[EncoderSpec], None] = lambda spec: None,
) -> tuple[EncoderSpec, str]:
    """Return the encoder to use, and one line that names it and the reason.

    auto: the first candidate whose ids equal the library's on the probes and on `sample` (UTF-8
    texts of the corpus), else the library; fast: a candidate, or DataError; exact: the library.
    `on_candidate` is called before a candidate is compared, so that workers can start to build it.
    """
    library = tokenizer.library_name
    exact = EncoderSpec(tokenizer.raw, tokenizer.file_name, tokenizer.special_tokens, tokenizer.eod)
    if choice == "exact":
        return exact, f"{library} (exact), as requested"
    reasons: list[str] = []  # why candidates were rejected
    for name in CANDIDATES[library]:
        spec = replace(exact, fast_encoder=name)
        try:
            _encoder_class(name).check(tokenizer)
            on_candidate(spec)
            mismatch = find_mismatch(spec, [*probe_texts(tokenizer), *sample], tokenizer)
        except FastEncoderUnavailable as error:
            mismatch = str(error)
        if mismatch is None:
            size = sum(map(len, sample))
            proof = f"ids equal to those of {library} on {size:,} bytes of this corpus"
            return spec, "; ".join([f"{spec.name}: {proof}", *reasons])
        reasons.append(mismatch)
    why = "; ".join(reasons)
    if choice == "fast":
        raise DataError(f"the fast encoder cannot be used: {why}; choose auto or exact")
    return exact, f"{library} (exact): {why}"


def find_mismatch(spec: EncoderSpec, texts: Sequence[bytes], tokenizer: Tokenizer) -> str | None:
    """Return None if `spec` gives the library's ids for `texts`, else a line that says why not."""
    try:
        return spec.build(tokenizer).find_mismatch(texts)
    except FastEncoderUnavailable as error:
        return str(error)


def _encoder_class(name: FastEncoder) -> type[Wordwise] | type[Gigatoken]:
    """Import only what is used: sentencepiece and protobuf cost a worker 0.1 s."""
    if name == "wordwise":
        from fgpt.tokenizer.wordwise.encoder import Wordwise

        return Wordwise
    from fgpt.tokenizer.gigatoken_encoder import Gigatoken

    return Gigatoken
