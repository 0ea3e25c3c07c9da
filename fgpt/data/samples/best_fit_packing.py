"""Best-fit packing of a group of documents into full rows: few cuts, no padding, nothing lost.

The lengths of the documents are together exactly rows * size tokens.

1. Of a document of size tokens and more, whole rows are cut off its beginning.
2. What is left, longest first, goes where it fits best: into the row with the least room that is
   enough (best-fit decreasing; Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
3. Where no row has room for a piece, the roomiest is filled with its beginning, and its rest waits
   for its turn among the others. Room and pieces are equally many tokens, so all rows get full.

Ties: the piece that stands first in the stream, the row of the lowest number.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

from fgpt.data.samples.token_rows import ragged

_BITS = 40
_LOW = (1 << _BITS) - 1


class Packed(NamedTuple):
    """The rows of a group: the pieces of documents in them, each row's in the stream's order."""

    starts: np.ndarray
    """First token of each piece, counted from the group's beginning; int64 [m]."""
    lengths: np.ndarray
    """Tokens of each piece, int64 [m]."""
    firsts: np.ndarray
    """First piece of each row, and in the end m: int64 [rows + 1]."""


def pack(lengths: np.ndarray, rows: int, size: int) -> Packed:
    """Pack consecutive documents of `lengths`, int64 [d], into `rows` rows of `size` tokens each.

    The lengths must sum to rows * size.
    """
    assert int(lengths.sum()) == rows * size
    begins = np.cumsum(lengths) - lengths
    whole, rests = np.divmod(lengths, size)
    full = np.repeat(begins, whole) + size * ragged(np.zeros_like(whole), whole)  # [full rows]
    left = np.flatnonzero(rests)
    placed = _place((begins + whole * size)[left], rests[left], rows - len(full), size)
    row = np.concatenate((np.arange(len(full)), len(full) + placed[0]))
    starts = np.concatenate((full, placed[1]))
    sizes = np.concatenate((np.full(len(full), size), placed[2]))
    order = np.lexsort((starts, row))
    firsts = np.searchsorted(row[order], np.arange(rows + 1))
    return Packed(starts[order], sizes[order], firsts)


def _place(starts: np.ndarray, lengths: np.ndarray, rows: int, size: int) -> np.ndarray:
    """Steps 2 and 3: int64 [3, pieces] of (row, start, length) for pieces shorter than a row."""
    # one int for a piece or a row keeps the two sorted lists fast: (length, -start), (room, row)
    pieces = np.sort((lengths << _BITS) + (_LOW - starts)).tolist()
    rooms = [(size << _BITS) + row for row in range(rows)]
    placed: list[tuple[int, int, int]] = []
    while pieces:
        piece = pieces.pop()
        length, start = piece >> _BITS, _LOW - (piece & _LOW)
        at = bisect_left(rooms, length << _BITS)
        if at == len(rooms):
            room = rooms[-1] >> _BITS
            at = bisect_left(rooms, room << _BITS)
            insort(pieces, (length - room << _BITS) + (_LOW - start - room))
            length = room
        code = rooms.pop(at)
        placed.append((code & _LOW, start, length))
        if code >> _BITS > length:
            insort(rooms, code - (length << _BITS))
    return np.array(placed, dtype=np.int64).reshape(-1, 3).T
