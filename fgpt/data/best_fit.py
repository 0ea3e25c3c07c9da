"""Samples of best-fit packed documents: few documents are truncated, no padding, no token lost.

The n * seq_len tokens of an epoch, as a ring, are divided into groups of GROUP_SAMPLES samples that
begin at a random sample of the epoch; the last group is shorter. The documents of a group, cut at
its two ends, are packed into exactly as many samples (`pack`).

Order: the groups are permuted, then the samples of each pool of about POOL_GROUPS consecutive
groups. So consecutive samples come from few groups, and each rank packs a group about once per
epoch; packings are pure functions and cached.

    x = first of the pool + permute(seed, epoch, pool)(i - first of the pool)
    slot, row = divmod(x, GROUP_SAMPLES)
    group = permute(seed, epoch)(slot)      the short group has the last slot
"""

from __future__ import annotations

from bisect import bisect_left, insort
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fgpt.data.permutation import derive_key, permute
from fgpt.data.samples import (
    EpochSamples,
    TokenRanges,
    concat_aranges,
    epoch_offset,
    split_at_documents,
)
from fgpt.data.shards import IndexedTokens

GROUP_SAMPLES = 256  # packed together
POOL_GROUPS = 64  # shuffled together

_GROUPS, _POOL = 2, 3  # first value of `derive_key`
_BITS = 40
_LOW = (1 << _BITS) - 1


@lru_cache(maxsize=8)
def _group_key(seed: int, epoch: int) -> np.ndarray:
    """Key of the groups' order; its last word selects the first sample of the first group."""
    return derive_key(_GROUPS, seed, epoch)


class PackedGroup(NamedTuple):
    """The samples of a group, each a run of document fragments in the order of the stream."""

    starts: np.ndarray  # first token of each fragment, int64 [m]
    lengths: np.ndarray  # in tokens, int64 [m]
    first_fragments: np.ndarray  # first fragment of each sample, then m: int64 [samples + 1]


class BestFitSamples(EpochSamples):
    """Documents packed best-fit: a document that fits into a sample is rarely truncated."""

    def __init__(self, tokens: IndexedTokens, seq_len: int, **options: Any):
        super().__init__(tokens, seq_len, **options)
        self.full_groups, self.short_group = divmod(self.samples_per_epoch, GROUP_SAMPLES)
        """Number of groups of GROUP_SAMPLES samples; samples of the short group, 0 without one."""
        self.groups = self.full_groups + (self.short_group > 0)
        pool = GROUP_SAMPLES * POOL_GROUPS
        # the last pool takes a remainder of less than half a pool: it has 0.5 to 1.5 pools
        self._last_pool = max(0, (self.samples_per_epoch + pool // 2) // pool - 1)
        self._cached_pack = lru_cache(maxsize=3 * POOL_GROUPS)(self._pack)

    def locate(self, numbers: np.ndarray) -> TokenRanges:
        epochs, indices = self.split_epochs(numbers)
        groups, rows = np.empty_like(indices), np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            groups[chosen], rows[chosen] = self._shuffle(epoch, indices[chosen])
        return self._collect(epochs * self.groups + groups, rows)

    def _shuffle(self, epoch: int, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (group, sample in the group), int64 [k] each, of indices in an epoch."""
        # 1. permute the samples of each pool
        pool_size = GROUP_SAMPLES * POOL_GROUPS
        pools = np.minimum(indices // pool_size, self._last_pool)
        shuffled = np.empty_like(indices)
        for pool in np.unique(pools).tolist():
            chosen = pools == pool
            first = pool * pool_size
            size = pool_size if pool < self._last_pool else self.samples_per_epoch - first
            key = derive_key(_POOL, self.seed, epoch, pool)
            shuffled[chosen] = first + permute(key, size, indices[chosen] - first)
        slots, rows = np.divmod(shuffled, GROUP_SAMPLES)
        # 2. permute the full groups; the short one, if any, stays in the last slot
        groups = slots.copy()
        if self.full_groups:
            is_full = slots < self.full_groups
            key = _group_key(self.seed, epoch)
            groups[is_full] = permute(key, self.full_groups, slots[is_full])
        return groups, rows

    def _collect(self, group_ids: np.ndarray, rows: np.ndarray) -> TokenRanges:
        """Return the fragments of sample `rows[j]` of group `group_ids[j]`, for each j in order.

        `group_ids` number the groups of all epochs.
        """
        # 1. sort by group, so that each group is packed once
        order = np.argsort(group_ids, kind="stable")
        edges = np.flatnonzero(np.diff(group_ids[order], prepend=-1, append=-1))
        starts, lengths = [], []
        counts = np.empty_like(rows)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            chosen = order[low:high]
            packed = self._cached_pack(*divmod(int(group_ids[chosen[0]]), self.groups))
            first = packed.first_fragments[rows[chosen]]
            counts[chosen] = packed.first_fragments[rows[chosen] + 1] - first
            fragments = concat_aranges(first, counts[chosen])
            starts.append(packed.starts[fragments])
            lengths.append(packed.lengths[fragments])
        if not starts:
            return TokenRanges(np.zeros(0, np.int64), np.zeros(0, np.int64))
        # 2. undo the sort: bring the fragments into the order of the request
        offsets = np.empty_like(counts)
        offsets[order] = np.cumsum(counts[order]) - counts[order]
        back = concat_aranges(offsets, counts)
        return TokenRanges(np.concatenate(starts)[back], np.concatenate(lengths)[back])

    def _pack(self, epoch: int, group: int) -> PackedGroup:
        """Pack a group; its fragments are positions in the stream."""
        n, seq_len = self.samples_per_epoch, self.seq_len
        # 1. the group's tokens: one range of the stream, or two where it crosses the ring's end
        offset = epoch_offset(self.seed, epoch, seq_len)
        samples = GROUP_SAMPLES if group < self.full_groups else self.short_group
        first = (int(_group_key(self.seed, epoch)[-1]) % n + group * GROUP_SAMPLES) % n
        before_end = min(samples, n - first)
        ranges = TokenRanges(
            np.array([offset + first * seq_len, offset]),
            np.array([before_end, samples - before_end]) * seq_len,
        )
        # 2. its documents
        starts, lengths = split_at_documents(self.tokens, ranges)
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        # 3. pack them, then shift positions in the group to positions in the stream
        packed = pack(lengths, samples, seq_len)
        group_starts = np.cumsum(lengths) - lengths
        document = np.searchsorted(group_starts, packed.starts, side="right") - 1
        return packed._replace(starts=packed.starts + (starts - group_starts)[document])


def pack(lengths: np.ndarray, samples: int, seq_len: int) -> PackedGroup:
    """Pack consecutive documents of `lengths`, int64 [d], into `samples` samples of `seq_len`.

    The lengths must sum to samples * seq_len. Fragments are positions in the group.

    1. From a document of at least seq_len tokens, full samples are cut off at its beginning.
    2. The remainders, longest first, go into the sample with the least free space that suffices
       (best-fit decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
    3. If none suffices, the sample with the most free space takes the fragment's beginning, and its
       rest is placed later, in order of length. As free space and remaining tokens are equal, every
       sample becomes full.

    Ties: the fragment that is first in the stream, the sample with the lowest number.
    """
    assert int(lengths.sum()) == samples * seq_len
    begins = np.cumsum(lengths) - lengths
    # 1. full samples of long documents
    full_counts, remainders = np.divmod(lengths, seq_len)
    full = np.repeat(begins, full_counts) + seq_len * concat_aranges(
        np.zeros_like(full_counts), full_counts
    )
    # 2., 3. the remainders
    left = np.flatnonzero(remainders)
    sample, placed_starts, placed_lengths = _place_remainders(
        (begins + full_counts * seq_len)[left], remainders[left], samples - len(full), seq_len
    )
    # 4. fragments by sample, those of a sample in the order of the stream
    sample = np.concatenate((np.arange(len(full)), len(full) + sample))
    starts = np.concatenate((full, placed_starts))
    fragment_lengths = np.concatenate((np.full(len(full), seq_len), placed_lengths))
    order = np.lexsort((starts, sample))
    first_fragments = np.searchsorted(sample[order], np.arange(samples + 1))
    return PackedGroup(starts[order], fragment_lengths[order], first_fragments)


def _place_remainders(
    starts: np.ndarray, lengths: np.ndarray, samples: int, seq_len: int
) -> np.ndarray:
    """Steps 2 and 3 of `pack`: int64 [3, fragments] of (sample, start, length)."""
    # Sorted lists of ints, each two numbers of _BITS bits: faster than lists of tuples.
    # 1. fragments as (length, -start), samples as (free tokens, number)
    fragments = np.sort((lengths << _BITS) + (_LOW - starts)).tolist()
    free = [(seq_len << _BITS) + number for number in range(samples)]
    placed: list[tuple[int, int, int]] = []
    while fragments:
        # 2. the longest fragment, the first in the stream among equals
        fragment = fragments.pop()
        length, start = fragment >> _BITS, _LOW - (fragment & _LOW)
        # 3. the sample with the least free space that suffices
        at = bisect_left(free, length << _BITS)
        if at == len(free):
            # 4. none: split the fragment over the sample with the most free space
            most_free = free[-1] >> _BITS
            at = bisect_left(free, most_free << _BITS)
            insort(fragments, (length - most_free << _BITS) + (_LOW - start - most_free))
            length = most_free
        # 5. place it, and put the sample back with less free space
        entry = free.pop(at)
        placed.append((entry & _LOW, start, length))
        if entry >> _BITS > length:
            insort(free, entry - (length << _BITS))
    return np.array(placed, dtype=np.int64).reshape(-1, 3).T
