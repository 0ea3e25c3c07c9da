"""Samples of whole documents: groups of the stream, packed on demand.

The n * seq_len tokens of an epoch are divided into groups of GROUP samples, the last one shorter. A
group's documents, cut at its two ends, are packed into exactly as many rows (`packing.pack`).

Order: the groups are permuted; of POOL groups that follow one another in that order the rows are
permuted together. So the samples of a stretch come from few groups, and a group is packed about
once per rank and epoch; it is a pure function, kept for a while in memory.

    x = start of the pool + permute(seed, epoch, pool)(i - start)     row in the order of groups
    slot, row = divmod(x, GROUP)                                      but for the short group's slot
    group = permute(seed, epoch)(slot)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fgpt.data.permutation import derive, permute
from fgpt.data.samples.epochs import Epochs, phase_of
from fgpt.data.samples.packing import Packed, pack
from fgpt.data.samples.rows import Segments, cut, ragged
from fgpt.data.shards import IndexedTokens

GROUP = 256
"""Samples packed together."""
POOL = 64
"""Groups shuffled together."""

_SLOTS, _ROWS = 2, 3


class BestFit(Epochs):
    """Documents packed best-fit: those that fit into a row are seldom cut."""

    def __init__(self, tokens: IndexedTokens, seq_len: int, **options: Any):
        """See `Epochs`."""
        super().__init__(tokens, seq_len, **options)
        self.whole_groups, self.short = divmod(self.per_epoch, GROUP)
        """Groups of GROUP samples, and the samples of one more."""
        self._groups = self.whole_groups + (self.short > 0)
        # this pool's and the next one's
        self._packed = lru_cache(maxsize=2 * POOL)(self._pack)

    def segments(self, numbers: np.ndarray) -> Segments:
        """See `Epochs.segments`."""
        epochs, places = self.split(numbers)
        groups, rows = np.empty_like(places), np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            groups[here], rows[here] = self._find(epoch, places[here])
        return self._collect(epochs * self._groups + groups, rows)

    def _find(self, epoch: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(group, row in it), int64 [k] each, of places in an epoch."""
        key = derive(_SLOTS, self.seed, epoch)
        # the short group has a slot of its own, or the epoch would always end with it
        short_slot = int(key[-1]) % self._groups if self.short else self._groups
        missing = GROUP - self.short if self.short else 0
        size = GROUP * POOL

        def begin(pool: np.ndarray) -> np.ndarray:
            """Place at which a pool begins: pools behind the short group begin sooner."""
            before: np.ndarray = pool * size - missing * (pool * POOL > short_slot)
            return np.minimum(before, self.per_epoch)

        pools = places // size
        pools += places >= begin(pools + 1)
        shuffled = np.empty_like(places)
        for pool in np.unique(pools).tolist():
            here = pools == pool
            first, end = (int(x) for x in begin(np.array([pool, pool + 1])))
            inside = derive(_ROWS, self.seed, epoch, pool)
            shuffled[here] = first + permute(inside, end - first, places[here] - first)
        shuffled += missing * (shuffled >= short_slot * GROUP + self.short)
        slots, rows = np.divmod(shuffled, GROUP)
        groups = np.full_like(slots, self.whole_groups)
        whole = slots != short_slot
        order = (slots - (slots > short_slot))[whole]
        groups[whole] = permute(key, max(1, self.whole_groups), order)
        return groups, rows

    def _collect(self, keys: np.ndarray, rows: np.ndarray) -> Segments:
        """The segments of row `rows[j]` of packing `keys[j]`, for each j."""
        order = np.argsort(keys, kind="stable")
        edges = np.flatnonzero(np.diff(keys[order], prepend=-1, append=-1))
        starts, lengths = [], []
        counts = np.empty_like(rows)
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            here = order[low:high]
            packed = self._packed(*divmod(int(keys[here[0]]), self._groups))
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
        rows = GROUP if group < self.whole_groups else self.short
        begin = phase_of(self.seed, epoch, self.seq_len) + group * GROUP * self.seq_len
        whole = Segments(np.array([begin]), np.array([rows * self.seq_len]))
        documents = cut(self.tokens, whole).lengths
        packed = pack(documents[documents > 0], rows, self.seq_len)
        return packed._replace(starts=packed.starts + begin)
