"""Train, validation or test, for each document by its content: order and workers do not matter.

The key of a document is a hash of (seed, hash of its text), uniform on [0, 2^64). Documents with
a key below `valid` are validation, those from there to `test` are test, the rest is training. Equal
texts fall on the same side: nothing trained on is evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from fgpt.data.permutation import derive, mix
from fgpt.errors import DataError

text_hash = xxhash.xxh3_128_digest
"""Hash of a text's UTF-8 bytes, 16 bytes: XXH3-128, which takes a tenth of SHA-256's time."""


def split_keys(seed: int, digests: np.ndarray) -> np.ndarray:
    """Keys, uint64 [n], of documents with these hashes, uint8 [n, 16]."""
    heads = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]
    return mix(heads ^ derive(seed)[0])


@dataclass(frozen=True)
class Limits:
    """Where the splits end, on the scale of keys."""

    valid: int
    """Keys below are validation."""
    test: int
    """Keys from `valid` up to here, this one excluded, are test; `valid` if there is no test."""

    @property
    def names(self) -> tuple[str, ...]:
        """The splits there are; `side` counts along them."""
        return ("train", "valid", "test") if self.test > self.valid else ("train", "valid")

    def side(self, keys: np.ndarray) -> np.ndarray:
        """0 training, 1 validation, 2 test, for keys uint64 [n]."""
        below = [keys <= np.uint64(limit - 1) for limit in (self.valid, self.test)]
        return np.where(below[0], 1, np.where(below[1], 2, 0))


def usual_limits(valid: float, test: float) -> Limits:
    """Limits for these shares of the documents, whatever there is: most often `split_limits`'s."""
    end_valid = max(1, int(valid * 2**64))
    return Limits(end_valid, end_valid + int(test * 2**64))


def split_limits(valid: float, test: float, keys: Callable[[], Iterable[np.ndarray]]) -> Limits:
    """Limits for these shares of the documents, moved so that each split has at least one.

    `keys` gives all keys, uint64, in arrays; it is called once or twice. Raises DataError if there
    are fewer distinct documents than splits.
    """
    wanted = 3 if test > 0 else 2
    lowest, highest = _extremes(keys(), 0)
    end_valid = max(usual_limits(valid, test).valid, lowest + 1)
    end_test = end_valid
    if test > 0 and highest >= end_valid:
        second, _ = _extremes(keys(), end_valid)
        end_test = max(end_valid + int(test * 2**64), second + 1)
    if highest < end_test:  # too few documents for the shares
        end_valid, end_test = _squeezed(wanted, keys)
    return Limits(end_valid, end_test)


def _extremes(keys: Iterable[np.ndarray], least: int) -> tuple[int, int]:
    """(smallest, largest) of the keys that are >= `least`; there is one."""
    lows, highs = [], []
    for some in keys:
        some = some[some >= np.uint64(least)]
        if len(some):
            lows.append(int(some.min()))
            highs.append(int(some.max()))
    return min(lows), max(highs)


def _squeezed(wanted: int, keys: Callable[[], Iterable[np.ndarray]]) -> tuple[int, int]:
    """Limits that leave training the largest key alone, and test (if any) the one before."""
    distinct = np.zeros(0, np.uint64)
    for some in keys():
        distinct = np.unique(np.concatenate((distinct, some)))[-wanted:]
    if len(distinct) < wanted:
        raise DataError(
            f"the corpus has {len(distinct)} distinct document{'s' * (len(distinct) != 1)}, a split"
            f" by document needs {wanted}; set source.document_separator (--document_separator) to"
            " cut the text into documents"
        )
    last = [int(key) for key in distinct]
    return (last[-2], last[-1]) if wanted == 3 else (last[-1], last[-1])
