"""The "tokenizer" block of a recipe, and its checks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Kind = Literal["bpe", "sentencepiece-unigram", "sentencepiece-bpe"]
SpecialTokens = Literal["text", "control"]

EOD = "<|endoftext|>"
# 256 bytes and the end of document; SentencePiece also has pieces for unknown and blank, and needs
# room for one more.
MIN_VOCAB: dict[Kind, int] = {"bpe": 257, "sentencepiece-unigram": 260, "sentencepiece-bpe": 260}


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer encodes the corpus."""

    vocab_size: int = 4096
    """Largest vocabulary to learn from the corpus; unused with `path`."""
    path: str | None = None
    """An existing tokenizer (file or its directory) to use instead of learning one."""
    kind: Kind = "bpe"
    """What to learn: byte-level BPE (tokenizer.json), or a SentencePiece model with byte fallback
    (tokenizer.model); unused with `path`."""
    special_tokens: SpecialTokens = "text"
    """Encode the name of a special token in a document as text, or as the special token."""
    eod: str | None = None
    """Name of the token that ends every document; null: <|endoftext|> or another usual name."""
    sample_mb: int = 200
    """How much text to learn from, in MB (10^6 bytes of UTF-8); unused with `path`. The trainers
    use less where this much would take too much memory: SentencePiece 64 MB (Unigram 32 MB), BPE
    20 MB of Chinese."""


def spec_issues(spec: TokenizerSpec) -> list[str]:
    """Return one line for each invalid value of `spec`."""
    issues = []

    def require(is_valid: bool, key: str, value: Any, expected: str) -> None:
        if not is_valid:
            issues.append(f'"tokenizer.{key}" is {value!r}; {expected}')

    if spec.path:
        unused = replace(spec, path=None, special_tokens="text", eod=None)
        for key in ("vocab_size", "kind", "sample_mb"):
            value = getattr(unused, key)
            is_default = value == getattr(TokenizerSpec, key)
            require(is_default, key, value, "has no effect with tokenizer.path")
    else:
        smallest = MIN_VOCAB[spec.kind]
        fits = smallest <= spec.vocab_size < 2**31
        require(fits, "vocab_size", spec.vocab_size, f"at least {smallest} is needed")
        require(spec.sample_mb > 0, "sample_mb", spec.sample_mb, "1 or more is expected")
    is_name = spec.eod is None or (
        spec.eod != "" and spec.eod.isprintable() and " " not in spec.eod
    )
    require(is_name, "eod", spec.eod, "null or a name without blanks is expected")
    return issues
