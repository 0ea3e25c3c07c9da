"""Assignment of documents to train, validation and test by their content.

The key of a document is a hash of the seed and its text, uniform on [0, 2^64). Keys below
`SplitBoundaries.valid` are validation, those from there to `test` are test, the rest is training.
So the assignment depends neither on the order of documents nor on the number of workers, and equal
texts are in the same split: no evaluation text is trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from fgpt.data.permutation import derive_key, mix64
from fgpt.errors import DataError

text_hash = xxhash.xxh3_128_digest
"""Hash of a text's UTF-8 bytes, 16 bytes: XXH3-128, in a tenth of SHA-256's time."""


def split_keys(seed: int, digests: np.ndarray) -> np.ndarray:
    """Return the keys, uint64 [n], of documents with these text hashes, uint8 [n, 16]."""
    heads = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]
    return mix64(heads ^ derive_key(seed)[0])


@dataclass(frozen=True)
class SplitBoundaries:
    """The ranges of keys of the splits."""

    valid: int  # keys below are validation
    test: int  # keys in [valid, test) are test; equal to `valid` without a test split

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the splits, by the numbers that `assign` returns."""
        return ("train", "valid", "test") if self.test > self.valid else ("train", "valid")

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """Return 0 (training), 1 (validation) or 2 (test) for each of `keys`, uint64 [n]."""
        # compare with boundary - 1: a boundary may be 2^64
        below_valid, below_test = (keys <= np.uint64(end - 1) for end in (self.valid, self.test))
        return np.where(below_valid, 1, np.where(below_test, 2, 0))


def nominal_boundaries(valid: float, test: float) -> SplitBoundaries:
    """Return the boundaries for these fractions; `split_boundaries` rarely differ."""
    end_valid = max(1, int(valid * 2**64))
    return SplitBoundaries(end_valid, end_valid + int(test * 2**64))


def split_boundaries(
    valid: float, test: float, keys: Callable[[], Iterable[np.ndarray]]
) -> SplitBoundaries:
    """Return the boundaries for these fractions, moved so that each split has a document.

    `keys` returns an iterable of all keys, in arrays uint64; it is called up to three times. Raises
    DataError if there are fewer distinct documents than splits.
    """
    # 1. validation has at least the lowest key
    lowest, highest = _min_max(keys(), 0)
    end_valid = max(nominal_boundaries(valid, test).valid, lowest + 1)
    # 2. test has at least the lowest key after validation's
    end_test = end_valid
    if test > 0 and highest >= end_valid:
        lowest_test, _ = _min_max(keys(), end_valid)
        end_test = max(end_valid + int(test * 2**64), lowest_test + 1)
    # 3. training has at least the highest key: else test (if any) and training get one key each
    if highest < end_test:
        splits = 3 if test > 0 else 2
        top = _highest_keys(splits, keys)
        end_valid, end_test = (top[-2], top[-1]) if splits == 3 else (top[-1], top[-1])
    return SplitBoundaries(end_valid, end_test)


def _min_max(keys: Iterable[np.ndarray], at_least: int) -> tuple[int, int]:
    """Return the smallest and largest of the keys >= `at_least`; one exists."""
    lows, highs = [], []
    for block in keys:
        block = block[block >= np.uint64(at_least)]
        if len(block):
            lows.append(int(block.min()))
            highs.append(int(block.max()))
    return min(lows), max(highs)


def _highest_keys(count: int, keys: Callable[[], Iterable[np.ndarray]]) -> list[int]:
    """Return the `count` highest distinct keys, ascending. Raises DataError if there are fewer."""
    distinct = np.zeros(0, np.uint64)
    for block in keys():
        distinct = np.unique(np.concatenate((distinct, block)))[-count:]
    if len(distinct) < count:
        raise DataError(
            f"the corpus has {len(distinct)} distinct document{'s' * (len(distinct) != 1)}, a split"
            f" by document needs {count}; set source.document_separator (--document_separator) to"
            " cut the text into documents"
        )
    return [int(key) for key in distinct]
