"""Drawing samples, and opening a data set of 10^10 tokens."""

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

from fgpt.data.index import dtype_for, write_index
from fgpt.data.samples.best_fit import BestFit
from fgpt.data.samples.blend import Blend
from fgpt.data.samples.epochs import Epochs, Stream
from fgpt.data.shards import IndexedTokens
from fgpt.utils.process import anonymous_bytes

VOCAB_SIZE = 50_257
BATCH = 512


@dataclass
class DrawResult:
    """One way to draw samples."""

    way: str
    """stream, best_fit or blend."""
    order: str
    """random: any sample of an epoch; training: one after the other."""
    seq_len: int
    """Tokens per sample."""
    samples: int
    """Samples drawn in a round."""
    seconds: list[float]
    """Of each round."""
    reads: bool
    """Whether their tokens were read, too."""

    @property
    def per_s(self) -> float:
        """Median samples per second."""
        return self.samples / statistics.median(self.seconds)


def synthetic(prefix: Path, tokens: int, mean_length: int) -> int:
    """A shard with a real index over a sparse file of zeros; its number of documents.

    Lengths are drawn from an exponential distribution, as texts from the web have them, about.
    """
    draw = np.random.default_rng(0)
    lengths = 1 + draw.exponential(mean_length, tokens // mean_length).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
    lengths = np.append(lengths, tokens - lengths.sum())
    lengths = lengths[lengths > 0]
    dtype = dtype_for(VOCAB_SIZE)
    write_index(prefix.with_suffix(".idx"), lengths, dtype)
    with prefix.with_suffix(".bin").open("wb") as file:
        file.truncate(tokens * dtype.itemsize)
    return len(lengths)


def drawn(prefix: Path, seq_len: int, count: int, rounds: int) -> list[DrawResult]:
    """Samples per second of every way, to their places and to their tokens."""
    tokens = IndexedTokens(prefix)
    stream: Epochs = Stream(tokens, seq_len, seed=1)
    packed: Epochs = BestFit(tokens, seq_len, seed=1)
    parts = [Stream(tokens, seq_len, seed=seed) for seed in (1, 2, 3)]
    blend = Blend(parts, [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)], seed=1)
    draw = np.random.default_rng(1)
    anywhere = draw.integers(0, stream.per_epoch, count)
    results = [
        _timed("stream", "random", seq_len, anywhere, rounds, stream.segments, reads=False),
        _timed("stream", "random", seq_len, anywhere, rounds, stream.batch, reads=True),
        _timed("blend", "random", seq_len, anywhere, rounds, blend.batch, reads=True),
        _timed("blend", "training", seq_len, np.arange(count), rounds, blend.batch, reads=True),
        _timed("best_fit", "training", seq_len, np.arange(count), rounds, packed.batch, reads=True),
    ]
    return results


def _timed(
    way: str,
    order: str,
    seq_len: int,
    numbers: np.ndarray,
    rounds: int,
    draw: Callable[[np.ndarray], object],
    *,
    reads: bool,
) -> DrawResult:
    seconds = []
    for _ in range(rounds):
        t0 = time.perf_counter()
        for start in range(0, len(numbers), BATCH):
            draw(numbers[start : start + BATCH])
        seconds.append(time.perf_counter() - t0)
    return DrawResult(way, order, seq_len, len(numbers), seconds, reads)


_OPEN = """
import json, sys
sys.path[:] = filter(None, sys.path)
from fgpt.bench.data.draw import opened
print(json.dumps(opened(sys.argv[1], int(sys.argv[2]))))
"""


def opened(prefix: str, seq_len: int) -> dict[str, float]:
    """Open a shard and read a first batch, in this process."""
    before = anonymous_bytes()
    t0 = time.perf_counter()
    tokens = IndexedTokens(prefix)
    t1 = time.perf_counter()
    Stream(tokens, seq_len, seed=1).batch(np.arange(32))
    t2 = time.perf_counter()
    grown = anonymous_bytes() - before
    return {"open_s": t1 - t0, "first_batch_s": t2 - t1, "grown_mb": grown / 1e6}


def opening_cost(prefix: Path, seq_len: int) -> dict[str, float]:
    """The same in a fresh process."""
    command = [sys.executable, "-c", _OPEN, str(prefix), str(seq_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found
