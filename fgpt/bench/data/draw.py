"""Speed of drawing samples, and cost of opening a data set of 10^10 tokens."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from fgpt.data.best_fit import BestFitSamples
from fgpt.data.blend import BlendedSamples
from fgpt.data.index import dtype_for, write_index
from fgpt.data.samples import EpochSamples, StreamSamples
from fgpt.data.shards import IndexedTokens
from fgpt.utils.process import anonymous_bytes

VOCAB_SIZE = 50_257
BATCH = 512


@dataclass
class DrawResult:
    """Timings of one way to draw samples."""

    way: str
    """stream, best_fit or blend."""
    order: str
    """random: any sample of an epoch; training: consecutive samples."""
    seq_len: int
    """Tokens per sample."""
    samples: int
    """Samples drawn per round."""
    seconds: list[float]
    """Of each round."""
    reads: bool
    """True: tokens are read; False: only their offsets are computed."""

    @property
    def per_s(self) -> float:
        """Median samples per second."""
        return self.samples / statistics.median(self.seconds)


def write_synthetic_shard(prefix: Path, tokens: int, mean_length: int) -> int:
    """Write a shard with a real index over a sparse file of zeros; return its number of documents.

    Lengths follow an exponential distribution, which approximates texts from the web.
    """
    rng = np.random.default_rng(0)
    lengths = 1 + rng.exponential(mean_length, tokens // mean_length).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
    lengths = np.append(lengths, tokens - lengths.sum())
    lengths = lengths[lengths > 0]
    dtype = dtype_for(VOCAB_SIZE)
    write_index(prefix.with_suffix(".idx"), lengths, dtype)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(tokens * dtype.itemsize)
    return len(lengths)


def measure_draws(prefix: Path, seq_len: int, count: int, rounds: int) -> list[DrawResult]:
    """Time drawing `count` samples of `seq_len` tokens, in every way and order."""
    tokens = IndexedTokens(prefix)
    stream: EpochSamples = StreamSamples(tokens, seq_len, seed=1)
    packed: EpochSamples = BestFitSamples(tokens, seq_len, seed=1)
    streams = [StreamSamples(tokens, seq_len, seed=seed) for seed in (1, 2, 3)]
    blend = BlendedSamples(streams, [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)], seed=1)
    numbers = {
        "random": np.random.default_rng(1).integers(0, stream.samples_per_epoch, count),
        "training": np.arange(count),
    }
    cases: list[tuple[str, str, Callable[[np.ndarray], object], bool]] = [
        ("stream", "random", stream.locate, False),
        ("stream", "random", stream.batch, True),
        ("blend", "random", blend.batch, True),
        ("blend", "training", blend.batch, True),
        ("best_fit", "training", packed.batch, True),
    ]
    results = []
    for way, order, draw, reads in cases:
        seconds = []
        for _ in range(rounds):
            t0 = time.perf_counter()
            for start in range(0, count, BATCH):
                draw(numbers[order][start : start + BATCH])
            seconds.append(time.perf_counter() - t0)
        results.append(DrawResult(way, order, seq_len, count, seconds, reads))
    return results


_OPEN = """
import json, sys
sys.path[:] = filter(None, sys.path)
from fgpt.bench.data.draw import open_shard
print(json.dumps(open_shard(sys.argv[1], int(sys.argv[2]))))
"""


def open_shard(prefix: str, seq_len: int) -> dict[str, float]:
    """Time opening a shard and reading the first batch in this process; memory growth in MB."""
    before = anonymous_bytes()
    t0 = time.perf_counter()
    tokens = IndexedTokens(prefix)
    t1 = time.perf_counter()
    StreamSamples(tokens, seq_len, seed=1).batch(np.arange(32))
    t2 = time.perf_counter()
    grown = anonymous_bytes() - before
    return {"open_s": t1 - t0, "first_batch_s": t2 - t1, "grown_mb": grown / 1e6}


def measure_opening(prefix: Path, seq_len: int) -> dict[str, float]:
    """Run `open_shard` in a fresh process."""
    command = [sys.executable, "-c", _OPEN, str(prefix), str(seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    cost: dict[str, float] = json.loads(done.stdout)
    return cost
