"""The rounds in which ranks collect whole matrices: shared out, and of bounded size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from fgpt.parallel import matrices
from fgpt.parallel.matrices import Matrix, plan_rounds

SHAPES = [(96, 32), (32, 32), (128, 32), (32, 128)] * 12


def consecutive(n_ranks: int) -> list[Matrix]:
    """As under ZeRO-1: equal parts of all elements, one after another."""
    part, first, found = sum(map(math.prod, SHAPES)) // n_ranks, 0, []
    for i, shape in enumerate(SHAPES):
        size = math.prod(shape)
        cuts = [min(max(rank * part - first, 0), size) for rank in range(n_ranks + 1)]
        ranges = tuple(zip(cuts, cuts[1:], strict=False))
        found.append(Matrix(f"{i}", shape, ranges))
        first += size
    return found


def even(n_ranks: int) -> list[Matrix]:
    """As under ZeRO-3: each rank keeps the same part of each matrix."""
    sizes = [math.prod(shape) // n_ranks for shape in SHAPES]
    return [
        Matrix(f"{i}", shape, tuple((r * size, (r + 1) * size) for r in range(n_ranks)))
        for i, (shape, size) in enumerate(zip(SHAPES, sizes, strict=True))
    ]


@pytest.mark.parametrize("kept", [consecutive, even])
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_rounds_are_shared_out(
    kept: Callable[[int], Any], n_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrices, "ROUND_ELEMENTS", 10_000)
    rounds = plan_rounds(kept(n_ranks), n_ranks)
    assert sorted(int(m.name) for round_ in rounds for m in round_) == list(range(len(SHAPES)))
    slowest = 0
    for round_ in rounds:
        own = [[m for m in round_ if m.owner == rank] for rank in range(n_ranks)]
        assert max(sum(math.prod(m.shape) for m in each) for each in own) <= 10_000
        slowest += max(sum(m.work for m in each) for each in own)
    # ranks wait for the slowest one in each round
    share = sum(m.work for round_ in rounds for m in round_) / n_ranks
    assert slowest < 1.25 * share


def test_a_matrix_above_the_limit_has_a_round_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "ROUND_ELEMENTS", 10)
    assert [len(round_) for round_ in plan_rounds(even(1), 1)] == [1] * len(SHAPES)
