"""Samples of whole documents: groups of the stream, packed on demand.

The n * seq_len tokens of an epoch, taken as a ring, are divided into groups of GROUP samples from a
place on that the epoch draws; the last group is shorter. A group's documents, cut at its two ends,
are packed into exactly as many rows (`packing.pack`).

Order: the groups are permuted; of about POOL groups that follow one another in that order the rows
are permuted together. So the samples of a stretch come from few groups, and a group is packed about
once per rank and epoch; it is a pure function, kept for a while in memory.

    x = begin of the pool + permute(seed, epoch, pool)(i - begin)
    slot, row = divmod(x, GROUP)
    group = permute(seed, epoch)(slot)      the short one is in the last slot
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fgpt.data.permutation import derive, permute
from fgpt.data.samples.best_fit_packing import Packed, pack
from fgpt.data.samples.epochs import Epochs, phase_of
from fgpt.data.samples.token_rows import Segments, cut, ragged
from fgpt.data.shards import IndexedTokens

GROUP = 256
"""Samples packed together."""
POOL = 64
"""Groups shuffled together."""

_SLOTS, _ROWS = 2, 3


@lru_cache(maxsize=8)
def _group_key(seed: int, epoch: int) -> np.ndarray:
    """Of the groups' order, and in its last word of where they begin."""
    return derive(_SLOTS, seed, epoch)


class BestFit(Epochs):
    """Documents packed best-fit: those that fit into a row are seldom cut."""

    def __init__(self, tokens: IndexedTokens, seq_len: int, **options: Any):
        """See `Epochs`."""
        super().__init__(tokens, seq_len, **options)
        self.whole_groups, self.short = divmod(self.per_epoch, GROUP)
        """Groups of GROUP samples, and the samples of one more."""
        self.groups = self.whole_groups + (self.short > 0)
        size = GROUP * POOL
        self._last_pool = max(0, (self.per_epoch + size // 2) // size - 1)  # 0.5 to 1.5 of a pool
        self._packed = lru_cache(maxsize=3 * POOL)(self._pack)

    def segments(self, numbers: np.ndarray) -> Segments:
        """See `Epochs.segments`."""
        epochs, places = self.split(numbers)
        groups, rows = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            groups[here], rows[here] = self._find(epoch, places[here])
        return self._collect(epochs * self.groups + groups, rows)

    def _find(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(group, row in it), int64 [k] each, of places in an epoch."""
        size = GROUP * POOL
        pools = np.minimum(places // size, self._last_pool)
        shuffled = np.empty_like(places)
        for pool in np.unique(pools).tolist():
            here = pools == pool
            first = pool * size
            rows = size if pool < self._last_pool else self.per_epoch - first
            key = derive(_ROWS, self.seed, epoch, pool)
            shuffled[here] = first + permute(key, rows, places[here] - first)
        slots, rows = np.divmod(shuffled, GROUP)
        whole = slots < self.whole_groups
        groups = slots.copy()
        if self.whole_groups:
            key = _group_key(self.seed, epoch)
            groups[whole] = permute(key, self.whole_groups, slots[whole])
        return groups, rows

    def _collect(self, keys: np.ndarray, rows: np.ndarray) -> Segments:
        """The segments of row `rows[j]` of packing `keys[j]`, for each j."""
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1))
        starts, lengths = [], []
        counts = np.empty_like(rows)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            here = order[low:high]
            packed = self._packed(*divmod(int(keys[here[0]]), self.groups))
            first = packed.firsts[rows[here]]
            counts[here] = packed.firsts[rows[here] + 1] - first
            pieces = ragged(first, counts[here])
            starts.append(packed.starts[pieces])
            lengths.append(packed.lengths[pieces])
        if not starts:
            return Segments(np.zeros(0, np.int64), np.zeros(0, np.int64))
        offsets = np.empty_like(counts)
        offsets[order] = np.cumsum(counts[order]) - counts[order]
        back = ragged(offsets, counts)
        return Segments(np.concatenate(starts)[back], np.concatenate(lengths)[back])

    def _pack(self, epoch: int, group: int) -> Packed:
        """A group's rows; its pieces counted from the beginning of the stream."""
        n, size = self.per_epoch, self.seq_len
        begin = phase_of(self.seed, epoch, size)
        rows = GROUP if group < self.whole_groups else self.short
        first = (int(_group_key(self.seed, epoch)[-1]) % n + group * GROUP) % n
        head = min(rows, n - first)  # the ring's seam may be within the group
        ranges = Segments(
            np.array([begin + first * size, begin]), np.array([head, rows - head]) * size
        )
        starts, lengths = cut(self.tokens, ranges)
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        packed = pack(lengths, rows, size)
        places = np.cumsum(lengths) - lengths  # of the documents in the group
        document = np.searchsorted(places, packed.starts, side="right") - 1
        return packed._replace(starts=packed.starts + (starts - places)[document])
