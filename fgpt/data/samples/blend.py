"""Several data sets in one: sample g is the next sample of the data set whose turn it is.

Of every BLOCK consecutive samples, data set k has its share. Counted at the ends of blocks, its
samples so far are never 2 away from (samples) x (its weight), and with two data sets never more
than 1/2, however long the run: `shared` divides in two, rounds once, and divides each side again.
Each count it gives grows with the total, which sums rounded one by one would not. Within a block
the turns are permuted, so that they have no period which ranks could fall in step with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Protocol

import numpy as np

from fgpt.data.permutation import derive, permute
from fgpt.data.samples.rows import Rows
from fgpt.errors import DataError

BLOCK = 256
"""Consecutive samples that are shared out together."""

_TURNS = 4


class Samples(Protocol):
    """Numbered samples."""

    seq_len: int
    """Tokens per sample."""

    @property
    def unrepeated(self) -> int:
        """Samples before any token is read a second time."""
        ...

    def batch(self, numbers: np.ndarray) -> Rows:
        """The samples of numbers int64 [k], all >= 0. Raises DataError."""
        ...


class Blend:
    """The numbered samples of several data sets, mixed by weight."""

    def __init__(self, parts: Sequence[Samples], weights: Sequence[Fraction], *, seed: int = 0):
        """`parts`: samples of equal length; `weights`: positive, of any sum."""
        assert len(parts) == len(weights) and min(weights) > 0
        self.parts = tuple(parts)
        self.seq_len = parts[0].seq_len
        """Tokens per sample."""
        total = sum(weights, Fraction(0))
        self.shares = tuple(weight / total for weight in weights)
        """Share of the samples that each data set has; they sum to 1."""
        self._seed = seed
        denominator = math.lcm(*(share.denominator for share in self.shares))
        self._whole = tuple(int(share * denominator) for share in self.shares)
        self._turns = lru_cache(maxsize=64)(self._turns_of)

    @property
    def unrepeated(self) -> int:
        """Samples before the first data set begins its second epoch, but for a few."""
        pairs = zip(self.parts, self.shares, strict=True)
        return min(math.floor(part.unrepeated / share) for part, share in pairs)

    def turns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data set, number of its sample), int64 [k] each, of samples int64 [k] of the blend."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        blocks, places = np.divmod(numbers, BLOCK)
        which, inner = np.empty_like(numbers), np.empty_like(numbers)
        order = np.argsort(blocks, kind="stable")
        edges = np.flatnonzero(np.diff(blocks[order], prepend=-1, append=-1))
        for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            here = order[low:high]
            turns = self._turns(int(blocks[here[0]]))
            which[here], inner[here] = turns[:, places[here]]
        return which, inner

    def batch(self, numbers: np.ndarray) -> Rows:
        """See `Samples.batch`."""
        which, inner = self.turns(numbers)
        present = np.unique(which).tolist()
        read = [self.parts[k].batch(inner[which == k]) for k in present]
        back = np.argsort(np.argsort(which, kind="stable"))
        inputs, targets, begins = zip(*read, strict=True)
        return Rows(
            np.concatenate(inputs)[back],
            np.concatenate(targets)[back],
            None if begins[0] is None else np.concatenate(begins)[back],
        )

    def _turns_of(self, block: int) -> np.ndarray:
        """int64 [2, BLOCK]: whose turn it is, and the number of its sample."""
        before = shared(block * BLOCK, self._whole)
        after = shared((block + 1) * BLOCK, self._whole)
        counts = np.array([b - a for a, b in zip(before, after, strict=True)])
        sorted_turns = np.repeat(np.arange(len(counts)), counts)
        key = derive(_TURNS, self._seed, block)
        which = sorted_turns[permute(key, BLOCK, np.arange(BLOCK))]
        inner = np.empty(BLOCK, dtype=np.int64)
        # a stable sort keeps each data set's own order: its samples are numbered as they come
        inner[np.argsort(which, kind="stable")] = np.concatenate(
            [np.arange(a, b) for a, b in zip(before, after, strict=True)]
        )
        return np.stack((which, inner))


def shared(total: int, weights: Sequence[int]) -> list[int]:
    """`total` samples shared out by weight: whole numbers with this sum, none falling as it grows.

    Each is less than 2 from its exact share; of two data sets, at most 1/2.
    """
    counts = [0] * len(weights)
    _share(total, sorted(range(len(weights)), key=lambda k: -weights[k]), weights, counts)
    return counts


def _share(total: int, order: list[int], weights: Sequence[int], counts: list[int]) -> None:
    """Divide among the data sets in `order`, the heaviest first, as evenly as they can be halved.

    Then a side of several data sets has at most 2/3 of the weight, which keeps errors from adding
    up: an error e above becomes at most 1/2 + 2/3 e below, and never reaches 3/2.
    """
    if len(order) == 1:
        counts[order[0]] = total
        return
    whole = sum(weights[k] for k in order)
    sums = np.array([weights[k] for k in order[:-1]], dtype=object).cumsum()
    at = min(range(len(sums)), key=lambda i: abs(2 * sums[i] - whole))
    left = (2 * total * sums[at] + whole) // (2 * whole)
    _share(left, order[: at + 1], weights, counts)
    _share(total - left, order[at + 1 :], weights, counts)
