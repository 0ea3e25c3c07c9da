"""Assignment to splits: the right fractions, at least one document each, by content alone."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from fgpt.errors import DataError
from fgpt.prepare.split import SplitBoundaries, split_boundaries, split_keys


def keys_of(count: int, seed: int = 1) -> np.ndarray:
    digests = b"".join(xxhash.xxh3_128(b"%d" % i).digest() for i in range(count))
    return split_keys(seed, np.frombuffer(digests, np.uint8).reshape(-1, 16))


def sides(limits: SplitBoundaries, keys: np.ndarray) -> list[int]:
    return np.bincount(limits.assign(keys), minlength=3).tolist()


def limits_of(keys: np.ndarray, valid: float, test: float = 0.0) -> SplitBoundaries:
    return split_boundaries(valid, test, lambda: np.array_split(keys, 7))


@pytest.mark.parametrize("valid, test", [(0.1, 0.0), (0.1, 0.2), (0.5, 0.4), (0.005, 0.005)])
def test_shares(valid: float, test: float) -> None:
    keys = keys_of(20_000)
    counts = sides(limits_of(keys, valid, test), keys)
    expected = np.array([1 - valid - test, valid, test]) * len(keys)
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected + 1)).all()
    assert limits_of(keys, valid, test).names == ("train", "valid", "test")[: 2 + (test > 0)]


def test_the_seed_draws_others() -> None:
    first, second = (keys_of(1000, seed) for seed in (1, 2))
    low = 2**64 // 10
    both = ((first < low) & (second < low)).mean()
    assert 0 < both < 0.03


@pytest.mark.parametrize("count", [3, 4, 10, 100])
@pytest.mark.parametrize("valid", [1e-12, 0.3, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("test", [1e-12, 0.3, 0.9, 1 - 1e-12])
def test_no_split_is_empty(count: int, valid: float, test: float) -> None:
    keys = keys_of(count)
    assert min(sides(limits_of(keys, valid, test), keys)) >= 1
    assert min(sides(limits_of(keys, valid), keys)[:2]) >= 1


@pytest.mark.parametrize("distinct, test", [(1, 0.0), (1, 0.1), (2, 0.1)])
def test_too_few_documents(distinct: int, test: float) -> None:
    keys = np.repeat(keys_of(distinct), 5)
    with pytest.raises(DataError, match=f"the corpus has {distinct} distinct document"):
        limits_of(keys, 0.1, test)


def test_the_extreme_keys() -> None:
    keys = np.array([0, 1, 2**64 - 1], dtype=np.uint64)
    assert sides(limits_of(keys, 0.1, 0.1), keys) == [1, 1, 1]
