"""Assignment to splits: the right fractions, none too short or too long, by content alone."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from fgpt.errors import DataError
from fgpt.prepare.split import (
    SPLIT_TOKENS,
    SplitBoundaries,
    nominal_boundaries,
    split_boundaries,
    split_keys,
)


def keys_of(count: int, seed: int = 1) -> np.ndarray:
    digests = b"".join(xxhash.xxh3_128(b"%d" % i).digest() for i in range(count))
    return split_keys(seed, np.frombuffer(digests, np.uint8).reshape(-1, 16))


def sides(limits: SplitBoundaries, keys: np.ndarray) -> list[int]:
    return np.bincount(limits.assign(keys), minlength=3).tolist()


def limits_of(
    keys: np.ndarray, valid: float, test: float = 0.0, tokens: np.ndarray | None = None
) -> SplitBoundaries:
    """The boundaries for documents of `tokens` tokens, int [keys]; default 1000 each."""
    tokens = np.full(len(keys), 1000) if tokens is None else tokens
    blocks = list(zip(np.array_split(keys, 7), np.array_split(tokens, 7), strict=True))
    return split_boundaries(valid, test, lambda: blocks)


def sizes_of(limits: SplitBoundaries, keys: np.ndarray, tokens: np.ndarray) -> list[int]:
    """Tokens in training, validation and test."""
    return np.bincount(limits.assign(keys), tokens, minlength=3).astype(int).tolist()


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


@pytest.mark.parametrize("test", [0.0, 0.1])
def test_ordinary_corpora_get_the_fractions(test: float) -> None:
    keys = keys_of(2000)
    assert limits_of(keys, 0.01, test) == nominal_boundaries(0.01, test)


@pytest.mark.parametrize("count, tokens", [(150, 100), (2000, 10), (20, 1000), (40, 30)])
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("test", [0.0, 0.01])
def test_no_split_is_too_short(count: int, tokens: int, seed: int, test: float) -> None:
    """As of a play with 150 speeches: 1 % are a speech or two."""
    keys, lengths = keys_of(count, seed), np.full(count, tokens)
    train, *others = sizes_of(limits_of(keys, 0.01, test, lengths), keys, lengths)
    enough = min(SPLIT_TOKENS, count * tokens // 5)
    for size in others[: 1 + (test > 0)]:
        assert enough <= size < max(enough + tokens, 0.04 * count * tokens + 3 * tokens)
    assert train > count * tokens / 2


@pytest.mark.parametrize(
    "tokens",
    [[50_000_000, 3], [10**6, 10**6 // 2, 10**6 // 3], [10, 10, 10**6, 20], [5, *[10**4] * 3]],
)
@pytest.mark.parametrize("test", [0.0, 0.01])
def test_most_of_the_text_is_for_training(tokens: list[int], test: float) -> None:
    if len(tokens) < 3 and test:
        return
    for seed in range(50):
        keys, lengths = keys_of(len(tokens), seed), np.array(tokens)
        train, *others = sizes_of(limits_of(keys, 0.01, test, lengths), keys, lengths)
        assert train >= (0.33 if test else 0.49) * sum(tokens)  # one of three equal documents
        assert 0 < min(others[: 1 + (test > 0)]) and others[0] <= 0.51 * sum(tokens)


def test_a_fraction_that_was_asked_for_is_given() -> None:
    keys = keys_of(1000)
    assert limits_of(keys, 0.9) == nominal_boundaries(0.9, 0.0)
