"""The fastest encoder that gives the ids of the tokenizer's own library, checked on the text.

That is `wordwise` (our own, in C) for SentencePiece models and `gigatoken` (giga.py) for the rest,
where they can read the tokenizer. Either is believed only after comparison: on probes.py and a
sample when it is chosen, and on a part of every task. Texts with characters that gigatoken and the
library may know differently (newer.py) go to the library at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fgpt.errors import DataError
from fgpt.tokenizer.base import Ids, Library, Tokenizer, encode_with
from fgpt.tokenizer.errors import NoFastEncoder
from fgpt.tokenizer.gigatoken_encoder import Gigatoken
from fgpt.tokenizer.gigatoken_settings import GigaSettings, giga_settings
from fgpt.tokenizer.load import from_bytes
from fgpt.tokenizer.probes import probes
from fgpt.tokenizer.sentencepiece_model import SentencePieceTokenizer
from fgpt.tokenizer.sentencepiece_proto import ModelFacts
from fgpt.tokenizer.spec import SpecialTokens
from fgpt.tokenizer.unicode_guard import UnicodeGuard
from fgpt.tokenizer.wordwise.encoder import WordSettings, Wordwise, word_settings

Wanted = Literal["auto", "fast", "exact"]
FastSettings = WordSettings | GigaSettings
FAST: dict[str, tuple[Callable[[Tokenizer], FastSettings], ...]] = {
    "sentencepiece": (word_settings, giga_settings),
    "tokenizers": (giga_settings,),
}
"""Library -> what may encode in its place, the fastest first."""


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
    facts: ModelFacts | None = None
    """What a .model says of itself: reading it takes a process 0.1 s."""
    settings: FastSettings | None = None
    """What the fast encoder is told; None: the tokenizer's own library encodes."""

    @property
    def fast(self) -> bool:
        """Whether a fast encoder encodes."""
        return self.settings is not None

    @property
    def name(self) -> str:
        """The fast encoder's name, "" without one."""
        return self.settings.name if self.settings else ""

    def build(self, tokenizer: Tokenizer | None = None) -> Encoder:
        """Make the encoder (up to seconds for a large vocabulary); from `tokenizer`, which these
        bytes are of, if it is at hand.

        Raises DataError; NoFastEncoder, which is one, where the exact encoder would do.
        """
        if tokenizer is None:
            name = self.file_name
            tokenizer = from_bytes(self.raw, name, name, self.special_tokens, self.eod, self.facts)
        return Encoder(tokenizer, self.settings)


class Encoder:
    """UTF-8 -> ids, on the calling thread (the library `tokenizers` may use its own); for one
    thread at a time.
    """

    def __init__(self, tokenizer: Tokenizer, settings: FastSettings | None):
        """`settings`: of what encodes in place of the tokenizer's own library."""
        self._tokenizer = tokenizer
        self._settings = settings
        self._fast: Library | None = None
        self._newer: UnicodeGuard | None = None
        if isinstance(settings, WordSettings):
            self._fast = Wordwise(settings)
        elif settings is not None:
            self._fast = Gigatoken(settings)
            self._newer = UnicodeGuard()

    def encode(self, texts: Sequence[bytes]) -> Ids:
        """All ids end to end, uint32 [sum of lengths], no eod, and each length, int64 [texts].

        Raises NoFastEncoder if the fast library fails.
        """
        if self._fast is None:
            return self._with(self._tokenizer.library, texts)
        newer = self._newer.within(texts) if self._newer else []
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
        name = self._settings.name if self._settings else self._tokenizer.library_name
        return f"{name} gave other ids for a document, first at token {at}, near {near!r}"


def choose_encoder(
    tokenizer: Tokenizer,
    sample: Sequence[bytes],
    wanted: Wanted = "auto",
    expect: Callable[[EncoderSpec], None] = lambda spec: None,
) -> tuple[EncoderSpec, str]:
    """The encoder to use, and one line that says which and why.

    auto: the first of FAST that gives the library's ids on the probes and on `sample`, else the
    library; fast: one of those, or DataError; exact: the library. `expect` is told of a fast one
    before it is compared: nearly always that is the answer, and others can make ready meanwhile.
    """
    facts = tokenizer.facts if isinstance(tokenizer, SentencePieceTokenizer) else None
    exact = EncoderSpec(
        tokenizer.raw, tokenizer.file_name, tokenizer.special_tokens, tokenizer.eod, facts
    )
    library = tokenizer.library_name
    if wanted == "exact":
        return exact, f"{library} (exact), as asked for"
    faults = []
    for settings_of in FAST[library]:
        try:
            fast = replace(exact, settings=settings_of(tokenizer))
            expect(fast)
            fault = spot_check(fast, [*probes(tokenizer), *sample], tokenizer)
        except NoFastEncoder as refusal:
            fault = str(refusal)
        if fault is None:
            size = sum(map(len, sample))
            proof = f"ids equal to those of {library} on {size:,} bytes of this corpus"
            return fast, f"{fast.name}: {proof}"
        faults.append(fault)
    why = "; ".join(faults)
    if wanted == "fast":
        raise DataError(f"the fast encoder cannot be used: {why}; choose auto or exact")
    return exact, f"{library} (exact): {why}"


def spot_check(
    spec: EncoderSpec, texts: Sequence[bytes], tokenizer: Tokenizer | None = None
) -> str | None:
    """None if `spec` gives the library's ids for `texts`; else why not, in one line."""
    if not spec.fast:
        return None
    try:
        return spec.build(tokenizer).spot_check(texts)
    except NoFastEncoder as fault:
        return str(fault)
