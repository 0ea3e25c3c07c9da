"""Which tokenizer: the "tokenizer" block of a recipe, and its checks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["bpe", "sentencepiece-unigram", "sentencepiece-bpe"]
SpecialTokens = Literal["text", "control"]

EOD = "<|endoftext|>"
# 256 bytes and the end of a document; SentencePiece has pieces for unknowns and the blank besides,
# and wants room for one more.
MIN_VOCAB: dict[Kind, int] = {"bpe": 257, "sentencepiece-unigram": 260, "sentencepiece-bpe": 260}


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer encodes the corpus."""

    vocab_size: int = 4096
    """Ids to learn, at most, from the corpus itself; unused when `path` is given."""
    path: str | None = None
    """An existing tokenizer (file or its directory) to use instead of learning one."""
    kind: Kind = "bpe"
    """What to learn: byte-level BPE (tokenizer.json), or a SentencePiece model with byte fallback
    (tokenizer.model); unused when `path` is given."""
    special_tokens: SpecialTokens = "text"
    """What the name of a special token is in the text of a document: text like any other, or the
    special token itself."""
    eod: str | None = None
    """Name of the token that ends every document; null: <|endoftext|> or another usual name."""
    sample_mb: int = 200
    """Text to learn from, at most, in MB (10^6 bytes of UTF-8); unused when `path` is given. The
    trainers take a part of it where all would take too much memory: SentencePiece 64 MB (Unigram
    32 MB), BPE 20 MB of Chinese."""


def spec_faults(spec: TokenizerSpec) -> list[str]:
    """What is wrong with the values of `spec`, one line each; empty if nothing is."""
    faults = []

    def need(good: bool, key: str, value: Any, want: str) -> None:
        if not good:
            faults.append(f'"tokenizer.{key}" is {value!r}; {want}')

    if spec.path:
        unused = replace(spec, path=None, special_tokens="text", eod=None)
        for key in ("vocab_size", "kind", "sample_mb"):
            value = getattr(unused, key)
            fits = value == getattr(TokenizerSpec, key)
            need(fits, key, value, "has no effect with tokenizer.path")
    else:
        least = MIN_VOCAB[spec.kind]
        fits = least <= spec.vocab_size < 2**31
        need(fits, "vocab_size", spec.vocab_size, f"at least {least} is needed")
        need(spec.sample_mb > 0, "sample_mb", spec.sample_mb, "1 or more is expected")
    named = spec.eod is None or (spec.eod != "" and spec.eod.isprintable() and " " not in spec.eod)
    need(named, "eod", spec.eod, "null or a name without blanks is expected")
    return faults
