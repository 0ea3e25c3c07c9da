"""The fastest encoder that gives the ids of the tokenizer's own library, checked on the text.

`gigatoken` remembers the words it has seen; the exact encoder is the library itself. The
caller's processes are the parallelism.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fgpt.data.tokenizer.base import Ids, Library, Tokenizer, encode_with
from fgpt.data.tokenizer.jsonfile import JsonTokenizer
from fgpt.data.tokenizer.load import from_bytes
from fgpt.data.tokenizer.spec import SpecialTokens
from fgpt.errors import DataError

Wanted = Literal["auto", "fast", "exact"]


def encoder_spec(tokenizer: Tokenizer, *, fast: bool) -> EncoderSpec:
    """The encoder of a tokenizer, by gigatoken (unchecked) or by its own library."""
    return EncoderSpec(
        tokenizer.raw, tokenizer.file_name, tokenizer.special_tokens, tokenizer.eod, fast
    )


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker process needs to encode; picklable."""

    raw: bytes
    """The bytes of the tokenizer's file."""
    file_name: str
    """Its name: tokenizer.json or tokenizer.model."""
    special_tokens: SpecialTokens
    """Whether the name of a special token in a text is text or control."""
    eod: str
    """Name of the token that ends a document."""
    fast: bool
    """By gigatoken, else by the tokenizer's own library."""

    def build(self) -> Encoder:
        """Make the encoder (takes up to a second for a large vocabulary)."""
        name = self.file_name
        tokenizer = from_bytes(self.raw, name, name, self.special_tokens, self.eod)
        return Encoder(_gigatoken(tokenizer, self) if self.fast else tokenizer.library, tokenizer)


class Encoder:
    """UTF-8 -> ids."""

    def __init__(self, library: Library, tokenizer: Tokenizer):
        self._library = library
        self._literals = tokenizer.literals

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """All ids end to end, uint32 [sum of lengths], no eod, and each length, int64 [texts]."""
        return encode_with(self._library, texts, self._literals)


def _gigatoken(tokenizer: Tokenizer, spec: EncoderSpec) -> Library:
    from gigatoken.gigatoken_rs import load_hf_json

    backend = load_hf_json(_for_gigatoken(tokenizer, spec))

    def library(texts: list[bytes]) -> Ids:
        layout = backend.encode_batch(texts, parallel=False).layout
        offsets = np.asarray(layout.offsets)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        return ids, np.diff(offsets)

    return library


def _for_gigatoken(tokenizer: Tokenizer, spec: EncoderSpec) -> str:
    if not isinstance(tokenizer, JsonTokenizer):
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        return sentencepiece_to_tokenizer_json(tokenizer.raw)
    settings: dict[str, Any] = dict(tokenizer.settings)
    if spec.special_tokens == "text":
        added = settings.get("added_tokens") or []
        settings["added_tokens"] = [token for token in added if not token.get("special")]
    return json.dumps(settings)


def choose_encoder(
    tokenizer: Tokenizer, sample: Sequence[bytes], wanted: Wanted = "auto"
) -> tuple[EncoderSpec, str]:
    """The encoder to use, and one line that says which and why.

    "auto" takes gigatoken if it gives the library's ids on `sample`; "fast" raises DataError if it
    does not; "exact" takes the library itself.
    """
    exact = encoder_spec(tokenizer, fast=False)
    if wanted == "exact":
        return exact, f"{tokenizer.library_name} (exact): as asked"
    fast = replace(exact, fast=True)
    fault = spot_check(fast, sample)
    if fault is None:
        size = sum(map(len, sample))
        return fast, f"gigatoken: ids equal to {tokenizer.library_name}' on {size:,} bytes"
    if wanted == "fast":
        raise DataError(f"gigatoken cannot be used: {fault}; choose auto or exact")
    return exact, f"{tokenizer.library_name} (exact): {fault}"


def spot_check(spec: EncoderSpec, texts: Sequence[bytes]) -> str | None:
    """None if `spec` gives the library's ids for `texts`; else what differs, in one line."""
    if not spec.fast:
        return None
    if importlib.util.find_spec("gigatoken") is None:
        return "gigatoken is not installed: pip install 'fgpt[fast]'"
    try:
        found = spec.build().encode(texts)
    except Exception as error:
        return f"gigatoken cannot read this tokenizer ({error})"
    wanted = replace(spec, fast=False).build().encode(texts)
    same = all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
    return None if same else "gigatoken gave other ids"
