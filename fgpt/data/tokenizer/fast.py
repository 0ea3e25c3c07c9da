"""The fastest encoder that gives the ids of the tokenizer's own library, checked on the text.

That is `gigatoken` (giga.py) where it can read the tokenizer, and it is believed only after
comparison: on probes.py and a sample when it is chosen, and on a part of every task. Texts with
characters that the two may know differently (newer.py) go to the library at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal

import numpy as np

from fgpt.data.tokenizer.base import Ids, Library, Tokenizer, encode_with
from fgpt.data.tokenizer.giga import Gigatoken
from fgpt.data.tokenizer.giga_settings import GigaSettings, NoGigatoken, giga_settings
from fgpt.data.tokenizer.load import from_bytes
from fgpt.data.tokenizer.newer import NewerCharacters
from fgpt.data.tokenizer.probes import probes
from fgpt.data.tokenizer.spec import SpecialTokens
from fgpt.errors import DataError

Wanted = Literal["auto", "fast", "exact"]


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
    settings: GigaSettings | None = None
    """What gigatoken is told; None: the tokenizer's own library encodes."""

    @property
    def fast(self) -> bool:
        """Whether gigatoken encodes."""
        return self.settings is not None

    def build(self, tokenizer: Tokenizer | None = None) -> Encoder:
        """Make the encoder (up to seconds for a large vocabulary); from `tokenizer`, which these
        bytes are of, if it is at hand.

        Raises DataError; NoGigatoken, which is one, where the exact encoder would do.
        """
        if tokenizer is None:
            name = self.file_name
            tokenizer = from_bytes(self.raw, name, name, self.special_tokens, self.eod)
        return Encoder(tokenizer, Gigatoken(self.settings) if self.settings else None)


class Encoder:
    """UTF-8 -> ids, on the calling thread (the library `tokenizers` may use its own)."""

    def __init__(self, tokenizer: Tokenizer, fast: Library | None):
        """`fast`: what encodes in place of the tokenizer's own library."""
        self._tokenizer = tokenizer
        self._fast = fast
        self._newer = NewerCharacters()

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """All ids end to end, uint32 [sum of lengths], no eod, and each length, int64 [texts].

        Raises NoGigatoken if the fast library fails.
        """
        if self._fast is None:
            return self._with(self._tokenizer.library, texts)
        newer = self._newer.within(texts)
        if not newer:
            return self._with(self._fast, texts)
        settled = sorted(set(range(len(texts))) - set(newer))
        ids: list[np.ndarray] = [np.zeros(0, np.uint32)] * len(texts)
        for library, places in ((self._fast, settled), (self._tokenizer.library, newer)):
            found, lengths = self._with(library, [texts[i] for i in places])
            for i, end, length in zip(places, np.cumsum(lengths), lengths, strict=True):
                ids[i] = found[end - length : end]
        return np.concatenate(ids), np.array([len(some) for some in ids], np.int64)

    def _with(self, library: Library, texts: Sequence[bytes]) -> Ids:
        return encode_with(library, texts, self._tokenizer.literals)

    def spot_check(self, texts: Sequence[bytes]) -> str | None:
        """None if the ids of `texts` are those of the tokenizer's library, else what differs."""
        found, lengths = self.encode(texts)
        wanted, true_lengths = self._with(self._tokenizer.library, texts)
        if np.array_equal(found, wanted) and np.array_equal(lengths, true_lengths):
            return None
        ours = np.split(found, np.cumsum(lengths)[:-1])
        theirs = np.split(wanted, np.cumsum(true_lengths)[:-1])
        pairs = enumerate(zip(ours, theirs, strict=True))
        i = next(i for i, (a, b) in pairs if not np.array_equal(a, b))
        shared = min(len(ours[i]), len(theirs[i]))
        unequal = np.flatnonzero(ours[i][:shared] != theirs[i][:shared])
        at = int(unequal[0]) if len(unequal) else shared
        near = self._tokenizer.decode(theirs[i][max(0, at - 3) : at + 3])
        return f"gigatoken gave other ids for a document, first at token {at}, near {near!r}"


def choose_encoder(
    tokenizer: Tokenizer,
    sample: Sequence[bytes],
    wanted: Wanted = "auto",
    expect: Callable[[EncoderSpec], None] = lambda spec: None,
) -> tuple[EncoderSpec, str]:
    """The encoder to use, and one line that says which and why.

    auto: gigatoken if it gives the library's ids on the probes and on `sample`, else the library;
    fast: gigatoken, or DataError; exact: the library. `expect` is told of gigatoken before it is
    compared: nearly always that is the answer, and others can make ready meanwhile.
    """
    exact = EncoderSpec(tokenizer.raw, tokenizer.file_name, tokenizer.special_tokens, tokenizer.eod)
    library = tokenizer.library_name
    if wanted == "exact":
        return exact, f"{library} (exact), as asked for"
    try:
        fast = replace(exact, settings=giga_settings(tokenizer))
        expect(fast)
        fault = spot_check(fast, [*probes(tokenizer), *sample], tokenizer)
    except NoGigatoken as refusal:
        fault = str(refusal)
    if fault is None:
        size = sum(map(len, sample))
        proof = f"ids equal to those of {library} on {size:,} bytes of this corpus"
        return fast, f"gigatoken {version('gigatoken')}: {proof}"
    if wanted == "fast":
        raise DataError(f"the fast encoder cannot be used: {fault}; choose auto or exact")
    return exact, f"{library} (exact): {fault}"


def spot_check(
    spec: EncoderSpec, texts: Sequence[bytes], tokenizer: Tokenizer | None = None
) -> str | None:
    """None if `spec` gives the library's ids for `texts`; else why not, in one line."""
    if not spec.fast:
        return None
    try:
        return spec.build(tokenizer).spot_check(texts)
    except NoGigatoken as fault:
        return str(fault)
