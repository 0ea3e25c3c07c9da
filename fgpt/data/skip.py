"""Samples that training leaves out (`data.skip_samples`).

Samples keep their numbers: a step reads the next ones that are not left out, so that every batch
has its full size, and data position, stages and layouts mean the same as without.

    below(i)    numbers below range i that are read: first_i minus the lengths of the ranges before
    number(k)   of the k-th one read, from 0: k plus the lengths of the ranges with below(i) <= k
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SkippedSamples:
    """Ranges of sample numbers that are left out."""

    def __init__(self, ranges: Sequence[tuple[int, int]]):
        """`ranges`: (first, last) of each, ascending and disjoint."""
        self._ranges = np.array(ranges, dtype=np.int64).reshape(-1, 2)
        lengths = self._ranges[:, 1] - self._ranges[:, 0] + 1
        self._lengths = np.concatenate([[0], np.cumsum(lengths)])  # of the ranges before each
        self._below = self._ranges[:, 0] - self._lengths[:-1]

    def numbers(self, first: int, indices: np.ndarray) -> np.ndarray:
        """Return the sample numbers, int64 [k], that have these indices, int64 [k] from 0, among
        those from `first` on that are read.
        """
        before = np.clip(first - self._ranges[:, 0], 0, np.diff(self._lengths)).sum()
        ordinals = indices + (first - before)
        return ordinals + self._lengths[np.searchsorted(self._below, ordinals, side="right")]

    def end(self, first: int, n: int) -> int:
        """Return the number after the last one of the `n` read from `first` on; `first` if none."""
        return first if n == 0 else int(self.numbers(first, np.array([n - 1]))[0]) + 1
