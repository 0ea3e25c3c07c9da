"""Boxes of tensors: the rectangular parts in which checkpoints store logical tensors.

A range of a flattened matrix is at most three boxes: the rest of a row, whole rows, the begin of a
row. So a ZeRO partition is a few boxes of each parameter, and a reader of another layout takes
those that it needs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Box(NamedTuple):
    """The elements offsets[d] : offsets[d] + sizes[d] in each dimension d of a tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def n(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def moved(self, by: Sequence[int]) -> Box:
        """The box of a part of a tensor that begins at `by`, in the whole tensor."""
        return Box(tuple(o + b for o, b in zip(self.offsets, by, strict=True)), self.sizes)

    def common(self, other: Box) -> Box | None:
        """The elements that are in both boxes; None if there are none."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self.ends, other.ends)
        sizes = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return Box(begins, sizes) if all(size > 0 for size in sizes) else None

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last element in each dimension."""
        return tuple(o + s for o, s in zip(self.offsets, self.sizes, strict=True))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """The indices of these elements in a tensor of the elements of `outer`."""
        begins = (o - b for o, b in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(b, b + s) for b, s in zip(begins, self.sizes, strict=True))


def make_up(boxes: Sequence[Box], shape: Sequence[int]) -> bool:
    """Whether these boxes, without overlap, are all of a tensor of this shape."""
    # 1. each is inside, and together they have as many elements as the tensor
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape) or min(box.sizes, default=1) < 1:
            return False
        if any(end > size for end, size in zip(box.ends, shape, strict=True)):
            return False
    if sum(box.n for box in boxes) != math.prod(shape):
        return False
    # 2. none overlaps another: no place between the edges of the boxes is free
    corners = [*(box.offsets for box in boxes), *(box.ends for box in boxes), tuple(shape)]
    edges = [sorted({0, *of_axis}) for of_axis in zip(*corners, strict=True)]
    index = [{edge: i for i, edge in enumerate(of_axis)} for of_axis in edges]
    covered = np.zeros([len(of_axis) - 1 for of_axis in edges], dtype=bool)
    for box in boxes:
        places = zip(box.offsets, box.ends, index, strict=True)
        covered[tuple(slice(i[begin], i[end]) for begin, end, i in places)] = True
    return bool(covered.all())


def boxes_of_range(sizes: Sequence[int], begin: int, end: int) -> Iterator[tuple[Box, int]]:
    """Yield the boxes of the elements [begin, end) of a flattened tensor of these sizes, and the
    flat index of the first element of each; the elements of a box are consecutive.
    """
    if begin >= end:
        return
    if len(sizes) <= 1:
        yield Box((begin,) * len(sizes), (end - begin,) * len(sizes)), begin
        return
    row = math.prod(sizes[1:])
    first, last = -(-begin // row), end // row  # whole rows
    # 1. the rest of a row, or a part of one row
    if begin < first * row:
        yield from _boxes_of_row(sizes, begin, min(end, first * row))
    # 2. whole rows
    if first < last:
        zeros = (0,) * (len(sizes) - 1)
        yield Box((first, *zeros), (last - first, *sizes[1:])), first * row
    # 3. the begin of a row
    if last >= first and last * row < end:
        yield from _boxes_of_row(sizes, last * row, end)


def _boxes_of_row(sizes: Sequence[int], begin: int, end: int) -> Iterator[tuple[Box, int]]:
    """As `boxes_of_range`, within one row."""
    row = math.prod(sizes[1:])
    index = begin // row
    for box, start in boxes_of_range(sizes[1:], begin - index * row, end - index * row):
        yield Box((index, *box.offsets), (1, *box.sizes)), start + index * row
