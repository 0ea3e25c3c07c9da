"""`fgpt data inspect`: the contents of a data set, or of one shard in Megatron's format."""

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
from fgpt.errors import DataError, printable
from fgpt.prepare.verify import iter_document_lengths
from fgpt.tokenizer.base import Tokenizer

BAR_WIDTH = 40
SAMPLE_TOKENS = 60


@dataclass(frozen=True)
class ShardStats:
    """Statistics of a shard, from its index."""

    path: str
    dtype: str
    documents: int
    sequences: int
    tokens: int
    bytes: int
    lengths: dict[str, float]
    """Tokens per document: smallest, median, mean, 95th percentile, largest."""
    histogram: dict[int, int]
    """Number of documents of [2^k, 2^(k + 1)) tokens, by k; -1: empty ones."""


def shard_stats(tokens: IndexedTokens) -> ShardStats:
    """Compute the statistics; takes about 40 bytes of memory per document."""
    lengths = np.concatenate(list(iter_document_lengths(tokens)))
    powers = np.full(len(lengths), -1)
    nonempty = lengths > 0
    powers[nonempty] = np.frexp(lengths[nonempty])[1] - 1
    values, counts = np.unique(powers, return_counts=True)
    return ShardStats(
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
    """Print the contents of a data set's directory, or of the shard with prefix `path`.

    Raises DataError.
    """
    if (path / CARD_NAME).exists() or path.is_dir():
        dataset = open_token_dataset(path)
        _print_card(path, dataset.card, console)
        tokens = getattr(dataset, split)
        if tokens is None:
            raise DataError(f"{path}: has no {split} split")
        tokenizer = tokenizer or dataset.tokenizer
    else:
        tokens = IndexedTokens(path)
    _print_shard(shard_stats(tokens), console)
    if tokenizer is not None:
        _print_samples(tokens, tokenizer, n_samples, console)


def inspect_as_json(path: Path) -> dict[str, Any]:
    """Return the same as a JSON value: the card, if `path` is a data set, and every shard."""
    if not path.is_dir():
        return {"shards": {"": asdict(shard_stats(IndexedTokens(path)))}}
    dataset = open_token_dataset(path)
    shards = {name: asdict(shard_stats(getattr(dataset, name))) for name in dataset.card.splits}
    return {"card": json.loads(dataset.card.to_json()), "shards": shards}


def _print_card(path: Path, card: DataCard, console: Console) -> None:
    recipe, source = card.recipe, card.source
    skipped = f"{source.empty:,} blank and {source.flawed:,} malformed left out"
    lines = {
        "data set": str(path),
        "recipe": f"{recipe.name} ({recipe.source.kind}), errors {recipe.errors},"
        f" seed {recipe.seed}",
        "licence": recipe.licence or "not stated",
        "text": f"{source.bytes / 1e6:.1f} MB in {source.documents:,} documents ({skipped})",
        "tokenizer": f"{card.tokenizer.vocab_size} ids, eod {card.tokenizer.eod_id}, SHA-256"
        f" {card.tokenizer.sha256[:12]}...",
        "fingerprint": card.fingerprint(),
    }
    for key, value in lines.items():
        console.print(
            printable(f"{key:<12} {value}"), markup=False, highlight=False, soft_wrap=True
        )
    table = Table("split", "documents", "tokens", "largest id", "MB")
    for name, info in card.splits.items():
        numbers = (info.documents, info.tokens, info.max_id)
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{info.bin_bytes / 1e6:.1f}")
    console.print(table)


def _print_shard(stats: ShardStats, console: Console) -> None:
    lengths = ", ".join(f"{name} {value:g}" for name, value in stats.lengths.items())
    sequences = f" in {stats.sequences:,} sequences" * (stats.sequences != stats.documents)
    sizes = f"{stats.documents:,} documents{sequences}, {stats.tokens:,} tokens, {stats.dtype}"
    console.print(
        printable(f"{stats.path}: {sizes}"), markup=False, highlight=False, soft_wrap=True
    )
    console.print(f"tokens per document: {lengths}", highlight=False, soft_wrap=True)
    highest = max(stats.histogram.values())
    for power, count in stats.histogram.items():
        low, high = (0, 0) if power < 0 else (2**power, 2 ** (power + 1) - 1)
        bar = "#" * max(1, round(BAR_WIDTH * count / highest))
        console.print(f"{low:>10,} .. {high:<10,} {count:>10,}  {bar}", highlight=False)


def _print_samples(
    tokens: IndexedTokens, tokenizer: Tokenizer, n_samples: int, console: Console
) -> None:
    """Print the beginnings of evenly spaced documents."""
    count = min(n_samples, tokens.document_count)
    for i in sorted({k * tokens.document_count // count for k in range(count)}):
        ids = tokens.document(i)
        text = tokenizer.decode(ids[:SAMPLE_TOKENS])
        # control characters would reach the terminal
        text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        more = "..." if len(ids) > SAMPLE_TOKENS else ""
        console.print(f"--- document {i:,}, {len(ids):,} tokens", highlight=False)
        console.print(text + more, markup=False, highlight=False, soft_wrap=True)
