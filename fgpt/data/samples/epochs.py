"""The numbered samples of one split, epoch after epoch; in order of the stream: `Stream`.

The split is one stream of T tokens. Samples are numbered globally, through all epochs:

    (epoch, i) = divmod(g, n)      n = T // seq_len - 1, the same for every epoch

An epoch reads the n * seq_len tokens that begin at its phase, each of them once as an input:

    0 <= phase(seed, epoch) < seq_len, so that each epoch cuts the stream elsewhere
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np

from fgpt.data.permutation import derive, permute
from fgpt.data.samples.token_rows import Rows, Segments, read
from fgpt.data.shards import IndexedTokens
from fgpt.errors import DataError

_ORDER, _PHASE = 0, 1


@lru_cache(maxsize=8)
def _order_key(seed: int, epoch: int) -> np.ndarray:
    return derive(_ORDER, seed, epoch)


@lru_cache(maxsize=8)
def phase_of(seed: int, epoch: int, seq_len: int) -> int:
    """Where the epoch begins in the stream, in tokens: in [0, seq_len)."""
    return int(derive(_PHASE, seed, epoch)[0]) % seq_len


class Epochs(ABC):
    """The numbered samples of one split."""

    def __init__(
        self, tokens: IndexedTokens, seq_len: int, *, seed: int = 0, documents: bool = False
    ):
        """`documents`: say of each token where its document begins (`Rows.begins`).

        Raises DataError if the split is too short for one sample of `seq_len` tokens.
        """
        self.tokens = tokens
        self.seq_len = seq_len
        """Tokens per sample."""
        self.seed = seed
        self.documents = documents
        total = tokens.tokens
        self.per_epoch = total // seq_len - 1
        """Samples per epoch (n above)."""
        if self.per_epoch < 1:
            what = f"a split of {total} tokens; seq_len {seq_len} needs at least {2 * seq_len}"
            raise DataError(f"{tokens.path}: {what}; use more text or a smaller seq_len")

    @property
    def samples_per_epoch(self) -> int:
        """Samples before any token is read a second time."""
        return self.per_epoch

    def split(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, place in it), int64 [k] each, of sample numbers int64 [k], all >= 0."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        epochs, places = np.divmod(numbers, self.per_epoch)
        return epochs, places

    @abstractmethod
    def segments(self, numbers: np.ndarray) -> Segments:
        """Where the samples of these numbers, int64 [k], lie in the stream."""

    def batch(self, numbers: np.ndarray) -> Rows:
        """The samples of numbers int64 [k]. Raises DataError."""
        return read(self.tokens, self.segments(numbers), self.seq_len, documents=self.documents)


class Stream(Epochs):
    """Documents end to end: a sample is one segment, the i-th of the epoch at a shuffled place.

    start = phase + seq_len * permute(seed, epoch)(i)
    """

    def segments(self, numbers: np.ndarray) -> Segments:
        """See `Epochs.segments`."""
        epochs, places = self.split(numbers)
        starts = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            order = permute(_order_key(self.seed, epoch), self.per_epoch, places[here])
            starts[here] = phase_of(self.seed, epoch, self.seq_len) + order * self.seq_len
        return Segments(starts, np.full(len(numbers), self.seq_len, dtype=np.int64))
