"""`fgpt data inspect`: what a data set, or a shard of Megatron's, holds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fgpt.data.card import CARD_NAME, DataCard
from fgpt.data.shards import IndexedTokens
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.scan import document_lengths
from fgpt.tokenizer.base import Tokenizer

BAR_WIDTH = 40
SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class ShardFacts:
    """What is known of one shard from its index."""

    path: str
    """The .bin file."""
    dtype: str
    """Type of the ids."""
    documents: int
    """Number of documents."""
    sequences: int
    """Number of sequences."""
    tokens: int
    """Number of tokens."""
    bytes: int
    """Size of .bin."""
    lengths: dict[str, float]
    """Tokens per document: smallest, median, mean, 95th percentile, largest."""
    histogram: dict[int, int]
    """Documents of at least 2^k and less than 2^(k + 1) tokens, by k; -1: empty ones."""


def shard_facts(tokens: IndexedTokens) -> ShardFacts:
    """Read off the index; takes some 40 bytes of memory per document."""
    lengths = np.concatenate(list(document_lengths(tokens)))
    powers = np.full(len(lengths), -1)
    some = lengths > 0
    powers[some] = np.frexp(lengths[some])[1] - 1
    values, counts = np.unique(powers, return_counts=True)
    return ShardFacts(
        path=str(tokens.path),
        dtype=tokens.dtype.name,
        documents=tokens.document_count,
        sequences=len(tokens.lengths),
        tokens=tokens.tokens,
        bytes=tokens.tokens * tokens.dtype.itemsize,
        lengths={
            "smallest": float(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": round(float(lengths.mean()), 1),
            "95 %": float(np.percentile(lengths, 95)),
            "largest": float(lengths.max()),
        },
        histogram=dict(zip(values.tolist(), counts.tolist(), strict=True)),
    )


def inspect(
    path: Path, console: Console, *, split: str, n_samples: int, tokenizer: Tokenizer | None
) -> None:
    """Print what is at `path`: a data set's directory, or the prefix of a .bin and .idx.

    Raises DataError.
    """
    if (path / CARD_NAME).exists() or path.is_dir():
        prepared = open_token_dataset(path)
        _print_card(path, prepared.card, console)
        tokens = getattr(prepared, split)
        if tokens is None:
            raise DataError(f"{path}: has no {split} split")
        tokenizer = tokenizer or prepared.tokenizer
    else:
        tokens = IndexedTokens(path)
    facts = shard_facts(tokens)
    _print_shard(facts, console)
    if tokenizer is not None:
        _print_samples(tokens, tokenizer, n_samples, console)


def as_json(path: Path) -> dict[str, Any]:
    """The same facts for programs: the card, if there is one, and every shard."""
    if not path.is_dir():
        return {"shards": {"": asdict(shard_facts(IndexedTokens(path)))}}
    prepared = open_token_dataset(path)
    shards = {name: asdict(shard_facts(getattr(prepared, name))) for name in prepared.card.splits}
    return {"card": json.loads(prepared.card.to_json()), "shards": shards}


def _print_card(path: Path, card: DataCard, console: Console) -> None:
    recipe, source = card.recipe, card.source
    left_out = f"{source.empty:,} blank and {source.flawed:,} flawed left out"
    made = f"errors {recipe.errors}, seed {recipe.seed}"
    rows = {
        "data set": str(path),
        "recipe": f"{recipe.name} ({recipe.source.kind}), {made}",
        "licence": recipe.licence or "not stated",
        "text": f"{source.bytes / 1e6:.1f} MB in {source.documents:,} documents ({left_out})",
        "tokenizer": f"{card.tokenizer.vocab_size} ids, eod {card.tokenizer.eod_id}, SHA-256"
        f" {card.tokenizer.sha256[:12]}...",
        "fingerprint": card.fingerprint(),
    }
    for key, value in rows.items():
        console.print(f"{key:<12} {value}", markup=False, highlight=False, soft_wrap=True)
    table = Table("split", "documents", "tokens", "largest id", "MB")
    for name, info in card.splits.items():
        numbers = (info.documents, info.tokens, info.max_id)
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{info.bin_bytes / 1e6:.1f}")
    console.print(table)


def _print_shard(facts: ShardFacts, console: Console) -> None:
    lengths = ", ".join(f"{name} {value:g}" for name, value in facts.lengths.items())
    several = f" in {facts.sequences:,} sequences" * (facts.sequences != facts.documents)
    what = f"{facts.documents:,} documents{several}, {facts.tokens:,} tokens, {facts.dtype}"
    console.print(f"{facts.path}: {what}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"tokens per document: {lengths}", highlight=False, soft_wrap=True)
    most = max(facts.histogram.values())
    for power, count in facts.histogram.items():
        low, high = (0, 0) if power < 0 else (2**power, 2 ** (power + 1) - 1)
        bar = "#" * max(1, round(BAR_WIDTH * count / most))
        console.print(f"{low:>10,} .. {high:<10,} {count:>10,}  {bar}", highlight=False)


def _print_samples(
    tokens: IndexedTokens, tokenizer: Tokenizer, n_samples: int, console: Console
) -> None:
    """The beginnings of documents from all over the shard."""
    count = min(n_samples, tokens.document_count)
    for i in sorted({k * tokens.document_count // count for k in range(count)}):
        ids = tokens.document(i)
        text = _printable(tokenizer.decode(ids[:SAMPLE_TOKENS]))
        more = "..." if len(ids) > SAMPLE_TOKENS else ""
        console.print(f"--- document {i:,}, {len(ids):,} tokens", highlight=False)
        console.print(text + more, markup=False, highlight=False, soft_wrap=True)


def _printable(text: str) -> str:
    """Text from anywhere, without what would drive a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
