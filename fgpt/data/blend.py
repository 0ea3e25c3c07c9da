"""Samples of several data sets, blended by weight.

Of every BLOCK consecutive samples, each data set has its share. At block ends, the number of
samples of data set k differs from its exact share by less than 2, and by at most 1/2 for two data
sets, however long the run: `apportion` halves the data sets recursively and rounds once per level.
The counts never decrease as the total grows, unlike independently rounded shares. Within a block
the order is permuted, so that no data rank reads one data set more often than the others:

    block, i = divmod(number, BLOCK);  p = permute(seed, block)(i)
    apportion(block * BLOCK) = c     apportion((block + 1) * BLOCK) = d
    data set k has the d_k - c_k values of p that follow those of data set k - 1; they are its
    samples c_k .. d_k - 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

import numpy as np

from fgpt.data.permutation import derive_key, mix64, permute
from fgpt.data.samples import SampleBatch, Samples
from fgpt.errors import DataError

BLOCK = 256
"""Consecutive samples that are apportioned together; a power of 4 (`permute`)."""

_BLEND = 4  # first value of `derive_key`
_MAX_ASSIGNED = 2**16


class BlendedSamples:
    """The numbered samples of several data sets, mixed by weight."""

    def __init__(self, datasets: Sequence[Samples], weights: Sequence[Fraction], *, seed: int = 0):
        """`datasets`: samples of equal length; `weights`: positive, of any sum."""
        assert len(datasets) == len(weights) and min(weights) > 0
        self.datasets = tuple(datasets)
        self.seq_len = datasets[0].seq_len
        total = sum(weights, Fraction(0))
        self.shares = tuple(weight / total for weight in weights)
        self._key = derive_key(_BLEND, seed)
        denominator = math.lcm(*(share.denominator for share in self.shares))
        self._integer_weights = tuple(int(share * denominator) for share in self.shares)

    @property
    def samples_per_epoch(self) -> int:
        """Samples before the first data set starts its second epoch, to within a few samples."""
        pairs = zip(self.datasets, self.shares, strict=True)
        return min(math.floor(dataset.samples_per_epoch / share) for dataset, share in pairs)

    def assign(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (data set, its sample number), int64 [k] each, of sample numbers int64 [k]."""
        if len(numbers) and numbers.min() < 0:
            raise DataError(f"sample number {numbers.min()} is negative")
        starts = range(0, len(numbers), _MAX_ASSIGNED)  # bounds the memory
        assigned = [self._assign(numbers[i : i + _MAX_ASSIGNED]) for i in starts]
        which, inner = zip(*assigned, strict=True)
        return np.concatenate(which), np.concatenate(inner)

    def _assign(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # 1. permute each sample within its block
        blocks, indices = np.divmod(numbers, BLOCK)
        keys = mix64(self._key[:, None] + mix64(blocks.astype(np.uint64)))  # [words, k]
        p = permute(keys, BLOCK, indices)
        # 2. samples of each data set before the block, and within it: [distinct blocks, data sets]
        distinct, at = np.unique(blocks, return_inverse=True)
        before = apportion(distinct * BLOCK, self._integer_weights)
        counts = apportion((distinct + 1) * BLOCK, self._integer_weights) - before
        # 3. data set k has the values of p in [ends[k - 1], ends[k])
        ends = np.cumsum(counts, axis=1)
        which = (p[:, None] >= ends[at]).sum(axis=1)
        return which, (before - ends + counts)[at, which] + p

    def counts(self, n_samples: int) -> np.ndarray:
        """Return how many samples of each data set the blocks of the first `n_samples` have."""
        whole_blocks = -(-n_samples // BLOCK) * BLOCK
        return apportion(np.array([whole_blocks]), self._integer_weights)[0]

    def batch(self, numbers: np.ndarray) -> SampleBatch:
        return read_assigned(self.datasets, *self.assign(numbers))


def read_assigned(datasets: Sequence[Samples], which: np.ndarray, inner: np.ndarray) -> SampleBatch:
    """Read the samples `inner` of the data sets `which`, int64 [k] each, in their order."""
    present = np.unique(which).tolist()
    batches = [datasets[k].batch(inner[which == k]) for k in present]
    back = np.argsort(np.argsort(which, kind="stable"))
    inputs, targets, begins = zip(*batches, strict=True)
    return SampleBatch(
        np.concatenate(inputs)[back],
        np.concatenate(targets)[back],
        None if begins[0] is None else np.concatenate(begins)[back],
    )


def apportion(totals: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    """Divide each of `totals`, int64 [t], in proportion to `weights`: int64 [t, data sets].

    Each result sums to its total, never decreases as the total grows, and differs from the exact
    share by less than 2; for two data sets by at most 1/2.
    """
    counts = np.empty((len(totals), len(weights)), dtype=np.int64)
    fits_int64 = len(totals) == 0 or 2 * int(totals.max()) * sum(weights) < 2**62
    exact = totals if fits_int64 else totals.astype(object)  # Python integers are unbounded
    heaviest_first = sorted(range(len(weights)), key=lambda k: -weights[k])
    _apportion(exact, heaviest_first, weights, counts)
    return counts


def _apportion(
    totals: np.ndarray, datasets: list[int], weights: Sequence[int], counts: np.ndarray
) -> None:
    """Fill `counts` for `datasets`, heaviest first, by recursive halving.

    A half of several data sets has at most 2/3 of the weight, so errors do not accumulate: an error
    e becomes at most 1/2 + 2/3 e one level below, which stays under 3/2.
    """
    if len(datasets) == 1:
        counts[:, datasets[0]] = totals
        return
    # 1. the cut that divides the weight most evenly
    total_weight = sum(weights[k] for k in datasets)
    sums = list(accumulate(weights[k] for k in datasets[:-1]))
    cut = min(range(len(sums)), key=lambda i: abs(2 * sums[i] - total_weight))
    # 2. the first half gets its share, rounded to nearest; the second half gets the rest
    first = (2 * totals * sums[cut] + total_weight) // (2 * total_weight)
    _apportion(first, datasets[: cut + 1], weights, counts)
    _apportion(totals - first, datasets[cut + 1 :], weights, counts)
