"""The numbered samples of one split, epoch after epoch, and how their tokens are read.

The split is one stream of T tokens. A sample is one or several ranges of it, seq_len tokens in all;
its targets are the next tokens in the stream. Samples are numbered globally, through all epochs:

    (epoch, i) = divmod(number, n)      n = T // seq_len - 1, the same for every epoch

An epoch reads the n * seq_len tokens from its offset on, each token once as an input:

    0 <= offset(seed, epoch) < seq_len, so that sample boundaries differ between epochs
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np

from fgpt.data.permutation import derive_key, permute
from fgpt.data.shards import IndexedTokens
from fgpt.errors import DataError

SHORTEST_ADVISED = 16
"""No shorter seq_len is advised, in tokens."""
_ORDER, _OFFSET = 0, 1  # first value of `derive_key`; best_fit.py has 2 and 3, blend.py 4


class TokenRanges(NamedTuple):
    """Ranges of the token stream. Of samples: in their order, each sample seq_len tokens."""

    starts: np.ndarray  # int64 [m], in tokens
    lengths: np.ndarray  # int64 [m], in tokens


class SampleBatch(NamedTuple):
    """The tokens of k samples."""

    inputs: np.ndarray  # int64 [k, seq_len]
    targets: np.ndarray  # int64 [k, seq_len]
    document_begins: np.ndarray | None
    """Column at which each token's document, or fragment of one, begins: int64 [k, seq_len]. None
    unless requested."""


class Samples(Protocol):
    """Numbered samples of seq_len tokens."""

    seq_len: int

    @property
    def samples_per_epoch(self) -> int:
        """Samples before any token is read a second time."""
        ...

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        """Read the samples with these numbers, int64 [k], all >= 0. Raises DataError."""
        ...


@lru_cache(maxsize=8)
def _order_key(seed: int, epoch: int) -> np.ndarray:
    return derive_key(_ORDER, seed, epoch)


@lru_cache(maxsize=8)
def epoch_offset(seed: int, epoch: int, seq_len: int) -> int:
    """Return the first token of an epoch, in [0, seq_len)."""
    return int(derive_key(_OFFSET, seed, epoch)[0]) % seq_len


class EpochSamples(ABC):
    """The numbered samples of one split; subclasses choose the ranges of each sample."""

    def __init__(
        self, tokens: IndexedTokens, seq_len: int, *, seed: int = 0, mark_documents: bool = False
    ):
        """`mark_documents`: fill `SampleBatch.document_begins`.

        Raises DataError if the split is too short for one sample.
        """
        self.tokens, self.seq_len, self.seed = tokens, seq_len, seed
        self.mark_documents = mark_documents
        total = tokens.tokens
        self.samples_per_epoch = total // seq_len - 1
        if self.samples_per_epoch < 1:
            size = f"a split of {total} tokens; seq_len {seq_len} needs at least {2 * seq_len}"
            fix = "prepare more text"
            if tokens.path.stem != "train":
                fix += ", with a larger --validation_fraction, or with --document_separator, which"
                fix += " divides long documents"
            if total >= 2 * SHORTEST_ADVISED:
                fix += f"; or --set data.seq_len={total // 2}"
            raise DataError(f"{tokens.path}: {size}; {fix}")

    def split_epochs(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch, index in the epoch), int64 [k] each, of sample numbers int64 [k]."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        epochs, indices = np.divmod(numbers, self.samples_per_epoch)
        return epochs, indices

    @abstractmethod
    def locate(self, numbers: np.ndarray) -> TokenRanges:
        """Return the ranges of the samples with these numbers, int64 [k]."""

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        ranges = self.locate(numbers)
        starts, lengths = ranges
        inputs = self.tokens.read_ranges(starts, lengths).reshape(-1, self.seq_len)
        targets = self.tokens.read_ranges(starts + 1, lengths).reshape(-1, self.seq_len)
        if not self.mark_documents:
            return SampleBatch(inputs, targets, None)
        lengths = split_at_documents(self.tokens, ranges).lengths
        columns = (np.cumsum(lengths) - lengths) % self.seq_len
        begins = np.repeat(columns, lengths).reshape(-1, self.seq_len)
        return SampleBatch(inputs, targets, begins)


class StreamSamples(EpochSamples):
    """Concatenated documents: a sample is one range, in shuffled order.

    start = offset + seq_len * permute(seed, epoch)(i)
    """

    def locate(self, numbers: np.ndarray) -> TokenRanges:
        epochs, indices = self.split_epochs(numbers)
        starts = np.empty(len(numbers), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            key = _order_key(self.seed, epoch)
            order = permute(key, self.samples_per_epoch, indices[chosen])
            offset = epoch_offset(self.seed, epoch, self.seq_len)
            starts[chosen] = offset + order * self.seq_len
        return TokenRanges(starts, np.full(len(numbers), self.seq_len, dtype=np.int64))


def split_at_documents(tokens: IndexedTokens, ranges: TokenRanges) -> TokenRanges:
    """Split the ranges wherever a document begins inside one. Raises DataError."""
    tokens.check_size()
    starts, stops = ranges.starts, ranges.starts + ranges.lengths
    itemsize = tokens.dtype.itemsize
    # 1. the sequences that begin inside each range: [low, high) by binary search of .idx
    bounds = np.concatenate((starts * itemsize + 1, stops * itemsize))
    low, high = searchsorted_mapped(tokens.pointers, bounds).reshape(2, -1)
    counts = np.maximum(high - low, 0)
    sequences = concat_aranges(low, counts)
    # 2. keep the first sequence of each document; a document may have several
    is_first = tokens.documents[searchsorted_mapped(tokens.documents, sequences)] == sequences
    range_of = np.repeat(np.arange(len(starts)), counts)[is_first]
    boundaries = tokens.pointers[sequences[is_first]] // itemsize
    # 3. starts: each range's own, then the document boundaries inside it
    fragments = 1 + np.bincount(range_of, minlength=len(starts))
    last = np.cumsum(fragments) - 1
    out_starts = np.empty(int(fragments.sum()), dtype=np.int64)
    is_range_start = np.zeros(len(out_starts), dtype=bool)
    is_range_start[last - fragments + 1] = True
    out_starts[is_range_start], out_starts[~is_range_start] = starts, boundaries
    # 4. stops: the next start, or the range's own stop for its last fragment
    out_stops = np.append(out_starts[1:], 0)
    out_stops[last] = stops
    return TokenRanges(out_starts, out_stops - out_starts)


def searchsorted_mapped(ascending: np.ndarray, values: np.ndarray) -> np.ndarray:
    """np.searchsorted for a memory-mapped array that is not aligned, as those of Megatron's index.

    np.searchsorted would copy all of such an array. Returns int64 [values].
    """
    found: np.ndarray = np.zeros(len(values), dtype=np.int64)
    step = 1 << max(0, len(ascending).bit_length() - 1)
    while step and len(ascending):
        probe = found + step
        is_less = ascending[np.minimum(probe, len(ascending)) - 1] < values
        found = np.where(is_less & (probe <= len(ascending)), probe, found)
        step >>= 1
    return found


def concat_aranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Concatenate [first, first + 1, ...] of each first and count: int64 [sum of counts]."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(firsts - offsets, counts) + np.arange(int(counts.sum()))
