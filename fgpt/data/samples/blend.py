"""Several data sets in one: sample g is a sample of the data set whose turn it is.

Of every BLOCK consecutive samples, data set k has its share. Counted at the ends of blocks, its
samples so far are never 2 away from (samples) x (its weight), and with two data sets never more
than 1/2, however long the run: `shared` divides in two, rounds once, and divides each side again.
Each count it gives grows with the total, which sums rounded one by one would not. Within a block
the turns are permuted, so that they have no period which ranks could fall in step with:

    block, place = divmod(g, BLOCK);  p = permute(seed, block)(place)
    shared(block * BLOCK) = c     shared((block + 1) * BLOCK) = d
    data set k has the next d_k - c_k values of p after data set k - 1, its samples c_k .. d_k - 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Protocol

import numpy as np

from fgpt.data.permutation import derive, mix, permute
from fgpt.data.samples.token_rows import Rows
from fgpt.errors import DataError

BLOCK = 256
"""Consecutive samples that are shared out together."""

_TURNS = 4
_AT_ONCE = 2**16


class Samples(Protocol):
    """Numbered samples."""

    seq_len: int
    """Tokens per sample."""

    @property
    def samples_per_epoch(self) -> int:
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
        self._key = derive(_TURNS, seed)
        denominator = math.lcm(*(share.denominator for share in self.shares))
        self._whole = tuple(int(share * denominator) for share in self.shares)

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the first data set begins its second epoch, but for a few."""
        pairs = zip(self.parts, self.shares, strict=True)
        return min(math.floor(part.samples_per_epoch / share) for part, share in pairs)

    def turns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data set, number of its sample), int64 [k] each, of samples int64 [k] of the blend."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        slices = [self._turns(numbers[i : i + _AT_ONCE]) for i in range(0, len(numbers), _AT_ONCE)]
        which, inner = zip(*slices, strict=True)
        return np.concatenate(which), np.concatenate(inner)

    def _turns(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        blocks, places = np.divmod(numbers, BLOCK)
        keys = mix(self._key[:, None] + mix(blocks.astype(np.uint64)))  # [words, k]
        p = permute(keys, BLOCK, places)
        distinct, at = np.unique(blocks, return_inverse=True)
        before = shared(distinct * BLOCK, self._whole)  # [blocks, parts]
        counts = shared((distinct + 1) * BLOCK, self._whole) - before
        ends = np.cumsum(counts, axis=1)
        which = (p[:, None] >= ends[at]).sum(axis=1)
        return which, (before - ends + counts)[at, which] + p

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


def shared(totals: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """Each of `totals`, int64 [t], shared out by weight: int64 [t, parts].

    A row sums to its total, none of its counts is less than in the row of a smaller total, and each
    is less than 2 from its exact share; of two data sets, at most 1/2.
    """
    counts = np.empty((len(totals), len(weights)), dtype=np.int64)
    fits = len(totals) == 0 or 2 * int(totals.max()) * sum(weights) < 2**62
    exact = totals if fits else totals.astype(object)  # Python's integers have no bounds
    _share(exact, sorted(range(len(weights)), key=lambda k: -weights[k]), weights, counts)
    return counts


def _share(
    totals: np.ndarray, order: list[int], weights: Sequence[int], counts: np.ndarray
) -> None:
    """Divide among the data sets in `order`, the heaviest first, as evenly as they can be halved.

    Then a side of several data sets has at most 2/3 of the weight, which keeps errors from adding
    up: an error e above becomes at most 1/2 + 2/3 e below, and never reaches 3/2.
    """
    if len(order) == 1:
        counts[:, order[0]] = totals
        return
    whole = sum(weights[k] for k in order)
    sums = list(accumulate(weights[k] for k in order[:-1]))
    at = min(range(len(sums)), key=lambda i: abs(2 * sums[i] - whole))
    left = (2 * totals * sums[at] + whole) // (2 * whole)
    _share(left, order[: at + 1], weights, counts)
    _share(totals - left, order[at + 1 :], weights, counts)
