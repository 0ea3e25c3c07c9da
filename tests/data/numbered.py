"""Splits whose token k is k: a token's value is its position."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fgpt.data.shards import IndexedTokens
from fgpt.prepare.shard_writer import ShardWriter


def numbered(folder: Path, lengths: list[int], name: str = "x") -> IndexedTokens:
    """A split of documents of these lengths."""
    ends = np.cumsum(lengths).tolist()
    with ShardWriter(folder / name, ends[-1]) as writer:
        for end, length in zip(ends, lengths, strict=True):
            writer.add(np.arange(end - length, end))
        writer.close()
    return IndexedTokens(folder / name)


def random_lengths(seed: int, count: int, mean: float) -> list[int]:
    """Lengths of documents, lognormal."""
    draw = np.random.default_rng(seed)
    return (draw.lognormal(np.log(mean), 0.8, count).astype(int) + 1).tolist()
