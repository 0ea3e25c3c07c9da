"""Blends: shares without drift, each data set's samples block by block, none twice."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fgpt.data.blend import BLOCK, BlendedSamples, apportion
from fgpt.data.samples import StreamSamples
from fgpt.errors import DataError
from tests.data.numbered import numbered

WEIGHTS = [
    ["0.5", "0.5"],
    ["0.7", "0.3"],
    ["1", "1e-6"],
    ["1e-6", "1", "1e-6"],
    ["0.45", "0.4", "0.1", "0.05"],
    ["3", "2", "2", "2", "1", "1", "1e-3"],
    ["1"] * 17,
    ["0.95", *["0.001"] * 50],
    ["0.0016", "0.9984"],
]


def shares(weights: list[str]) -> list[Fraction]:
    total = sum(map(Fraction, weights))
    return [Fraction(weight) / total for weight in weights]


def whole(weights: list[str]) -> list[int]:
    return [int(Fraction(weight) * 10**6) for weight in weights]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_proportions_never_drift(weights: list[str]) -> None:
    exact = shares(weights)
    bound = Fraction(1, 2) if len(weights) == 2 else 2
    blocks = np.array([*range(3000), *(10**k for k in range(4, 16))])
    counts = apportion(blocks * BLOCK, whole(weights))
    assert (counts.sum(axis=1) == blocks * BLOCK).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    for block, row in zip(blocks.tolist(), counts.tolist(), strict=True):
        off = [abs(n - block * BLOCK * share) for n, share in zip(row, exact, strict=True)]
        assert max(off) <= bound, (block, max(off))


def test_counts_grow_one_at_a_time() -> None:
    """From each total to the next, one data set gains one; independently rounded shares do not."""
    draw = np.random.default_rng(0)
    for _ in range(60):
        weights = (10 ** draw.uniform(0, 6, int(draw.integers(2, 12)))).astype(int).tolist()
        steps = np.diff(apportion(np.arange(400), weights), axis=0)
        assert (steps.sum(axis=1) == 1).all() and (steps >= 0).all()


def blend(folder: Path, sizes: list[int], weights: list[str], seed: int = 0) -> BlendedSamples:
    """Splits whose tokens differ by 10^5."""
    parts = []
    for k, size in enumerate(sizes):
        tokens = numbered(folder, [size], f"{k}-{size}")
        tokens._map = tokens._map.astype(np.int64) + k * 100_000
        parts.append(StreamSamples(tokens, 10, seed=seed))
    return BlendedSamples(parts, [Fraction(weight) for weight in weights], seed=seed)


@pytest.mark.parametrize("weights", [["0.7", "0.3"], ["1", "1", "5"], ["1", "1e-6"], ["1"]])
def test_each_data_sets_samples_come_block_by_block(tmp_path: Path, weights: list[str]) -> None:
    mixed = blend(tmp_path, [500, 3000, 40][: len(weights)], weights, seed=3)
    numbers = np.arange(20 * BLOCK)
    which, inner = mixed.assign(numbers)
    for k in range(len(weights)):
        mine, blocks = inner[which == k], numbers[which == k] // BLOCK
        assert sorted(mine.tolist()) == list(range(len(mine)))
        assert (np.diff(blocks[np.argsort(mine)]) >= 0).all()
    rows = mixed.batch(numbers)
    for g in range(0, len(numbers), 7):
        one = mixed.datasets[which[g]].batch(inner[g : g + 1])
        assert np.array_equal(rows.inputs[g], one.inputs[0])
        assert np.array_equal(rows.targets[g], one.targets[0])
        assert (rows.inputs[g] // 100_000 == which[g]).all()


def test_a_small_data_set_is_repeated_epoch_by_epoch(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [5000, 60], ["0.5", "0.5"])
    assert mixed.samples_per_epoch == 2 * 5  # 5 samples in the small one
    rows = mixed.batch(np.arange(4 * BLOCK)).inputs
    small = rows[rows[:, 0] >= 100_000, 0] - 100_000
    assert len(small) == 2 * BLOCK  # 102 epochs and two samples
    _, often = np.unique(small // 10, return_counts=True)
    assert 102 <= often.min() <= often.max() <= 103


def test_the_order_has_no_period(tmp_path: Path) -> None:
    """Two data sets in equal shares: every rank reads about half from each."""
    which, _ = blend(tmp_path, [500, 500], ["1", "1"]).assign(np.arange(64 * BLOCK))
    for ranks in (2, 4, 8):
        for rank in range(ranks):
            assert abs(which[rank::ranks].mean() - 0.5) < 0.05
    blocks = which.reshape(64, BLOCK)
    assert (blocks.sum(axis=1) == BLOCK // 2).all()
    assert len({tuple(block) for block in blocks.tolist()}) == 64


def test_a_pure_function(tmp_path: Path) -> None:
    mixed = blend(tmp_path, [500, 3000], ["0.2", "0.8"], seed=1)
    numbers = np.random.default_rng(0).integers(0, 10**12, 500)
    which, inner = mixed.assign(numbers)
    again = blend(tmp_path, [500, 3000], ["2", "8"], seed=1)  # the same shares
    for g in range(0, 500, 10):
        one = again.assign(numbers[g : g + 1])
        assert (one[0][0], one[1][0]) == (which[g], inner[g])
    other = blend(tmp_path, [500, 3000], ["0.2", "0.8"], seed=2).assign(numbers)
    assert (other[0] != which).any()
    with pytest.raises(DataError, match="sample number -1 is negative"):
        mixed.assign(np.array([3, -1]))
