"""Best-fit packing against a slow twin: full samples, every token once, few truncations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fgpt.data.best_fit import PackedGroup, pack

Piece = tuple[int, int]
"""(start, length)."""


def slow_pack(lengths: list[int], rows: int, size: int) -> list[list[Piece]]:
    """The rule as documented: one list of (start, length) for each sample."""
    out: list[list[Piece]] = []
    waiting: list[Piece] = []
    start = 0
    for length in lengths:
        while length >= size:
            out.append([(start, size)])
            start, length = start + size, length - size
        if length:
            waiting.append((start, length))
        start += length
    room = [size] * (rows - len(out))
    rest: list[list[Piece]] = [[] for _ in room]
    while waiting:
        start, length = min(waiting, key=lambda piece: (-piece[1], piece[0]))
        waiting.remove((start, length))
        enough = [row for row in range(len(room)) if room[row] >= length]
        if enough:
            row = min(enough, key=lambda row: (room[row], row))
        else:
            row = max(range(len(room)), key=lambda row: (room[row], -row))
            waiting.append((start + room[row], length - room[row]))
            length = room[row]
        rest[row].append((start, length))
        room[row] -= length
    assert not any(room)
    return out + [sorted(row) for row in rest]


def as_lists(packed: PackedGroup) -> list[list[Piece]]:
    pieces = list(zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True))
    edges = packed.first_fragments.tolist()
    return [pieces[a:b] for a, b in zip(edges[:-1], edges[1:], strict=True)]


def groups(count: int, longest: float = 3.0) -> Iterator[tuple[list[int], int, int]]:
    """Random documents that fill some rows: (lengths, rows, size)."""
    draw = np.random.default_rng(11)
    for _ in range(count):
        size, rows = int(draw.integers(1, 40)), int(draw.integers(1, 30))
        kind = draw.integers(4)
        lengths, left = [], size * rows
        while left:
            length = {
                0: int(draw.integers(1, max(2, int(longest * size)))),
                1: int(draw.lognormal(np.log(size / 3 + 1), 1)) + 1,
                2: max(1, int(0.6 * size)),
                3: int(draw.integers(1, 4)),
            }[int(kind)]
            lengths.append(min(length, left))
            left -= lengths[-1]
        yield lengths, rows, size


def test_as_the_slow_twin() -> None:
    for lengths, rows, size in groups(600):
        found = as_lists(pack(np.array(lengths), rows, size))
        assert found == slow_pack(lengths, rows, size), (lengths, rows, size)


def test_rows_are_full_and_no_token_is_lost_or_doubled() -> None:
    for lengths, rows, size in groups(300):
        packed = pack(np.array(lengths), rows, size)
        assert len(packed.first_fragments) == rows + 1 and packed.lengths.min() > 0
        assert [sum(n for _, n in row) for row in as_lists(packed)] == [size] * rows
        tokens = [s + i for row in as_lists(packed) for s, n in row for i in range(n)]
        assert sorted(tokens) == list(range(rows * size))
        ends = np.cumsum(lengths)
        document = np.searchsorted(ends, packed.starts, side="right")
        assert (packed.starts + packed.lengths <= ends[document]).all()  # within one document


@pytest.mark.parametrize(
    ("lengths", "rows", "size", "expected"),
    [
        ([10], 1, 10, [[(0, 10)]]),
        ([25, 5], 3, 10, [[(0, 10)], [(10, 10)], [(20, 5), (25, 5)]]),
        ([4, 6, 3, 7], 2, 10, [[(0, 4), (4, 6)], [(10, 3), (13, 7)]][::-1]),
        # 6 and 6 fill a row each up to 4, the third 6 is cut: 4 here, 2 there; 2 is left
        ([6, 6, 6, 2], 2, 10, [[(0, 6), (12, 4)], [(6, 6), (16, 2), (18, 2)]]),
    ],
)
def test_by_hand(lengths: list[int], rows: int, size: int, expected: list[list[Piece]]) -> None:
    assert as_lists(pack(np.array(lengths), rows, size)) == expected


def test_few_documents_are_cut() -> None:
    """Concatenation truncates a third of the documents that fit in a sample; packing one in 25."""
    draw = np.random.default_rng(3)
    size, rows = 512, 256
    lengths = np.minimum(draw.lognormal(5.0, 0.8, 5000).astype(np.int64) + 1, 4 * size)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), rows * size))]
    lengths = np.append(lengths, rows * size - lengths.sum())
    ends = np.cumsum(lengths)
    starts, short = ends - lengths, lengths <= size
    in_one_window = (ends - 1) // size == starts // size
    packed = pack(lengths, rows, size)
    pieces = set(zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True))
    documents = zip(starts[short].tolist(), lengths[short].tolist(), strict=True)
    whole = np.mean([document in pieces for document in documents])
    assert whole > 0.95 > 0.75 > in_one_window[short].mean()
