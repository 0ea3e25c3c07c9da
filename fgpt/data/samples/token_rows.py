"""From places in the stream to rows of tokens.

A sample is one or several segments of the split's stream of tokens, seq_len of them together. Its
inputs are the tokens at these places, its targets the true successors, one place further on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fgpt.data.shards import IndexedTokens


class Segments(NamedTuple):
    """Where samples lie in the stream: one after the other, each seq_len tokens long."""

    starts: np.ndarray
    """First token of each segment, int64 [m]."""
    lengths: np.ndarray
    """Tokens of each segment, int64 [m]; no segment belongs to two samples."""


class Rows(NamedTuple):
    """Samples, read."""

    inputs: np.ndarray
    """int64 [k, seq_len]."""
    targets: np.ndarray
    """int64 [k, seq_len]."""
    begins: np.ndarray | None
    """Column at which each token's piece of a document begins, int64 [k, seq_len]; None where it
    was not asked for."""


def read(tokens: IndexedTokens, segments: Segments, seq_len: int, *, documents: bool) -> Rows:
    """The tokens of samples; `documents` asks for `Rows.begins`. Raises DataError."""
    starts, lengths = segments
    inputs = tokens.pieces(starts, lengths).reshape(-1, seq_len)
    targets = tokens.pieces(starts + 1, lengths).reshape(-1, seq_len)
    if not documents:
        return Rows(inputs, targets, None)
    lengths = cut(tokens, segments).lengths
    columns = (np.cumsum(lengths) - lengths) % seq_len
    return Rows(inputs, targets, np.repeat(columns, lengths).reshape(-1, seq_len))


def cut(tokens: IndexedTokens, segments: Segments) -> Segments:
    """The segments, cut wherever a document begins inside of one. Raises DataError."""
    tokens.check_size()
    starts, stops = segments.starts, segments.starts + segments.lengths
    width = tokens.dtype.itemsize
    ends = np.concatenate((starts * width + 1, stops * width))
    low, high = search(tokens.pointers, ends).reshape(2, -1)
    counts = np.maximum(high - low, 0)
    sequences = ragged(low, counts)
    # a document may be several sequences: only its first one begins it
    begins = tokens.documents[search(tokens.documents, sequences)] == sequences
    owner = np.repeat(np.arange(len(starts)), counts)[begins]
    borders = tokens.pointers[sequences[begins]] // width
    pieces = 1 + np.bincount(owner, minlength=len(starts))
    last = np.cumsum(pieces) - 1
    out_starts = np.empty(int(pieces.sum()), dtype=np.int64)
    first = np.zeros(len(out_starts), dtype=bool)
    first[last - pieces + 1] = True
    out_starts[first], out_starts[~first] = starts, borders
    out_stops = np.append(out_starts[1:], 0)
    out_stops[last] = stops
    return Segments(out_starts, out_stops - out_starts)


def search(rising: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many entries of `rising` are less than each value: int64, as np.searchsorted has it.

    That would copy all of an array that a file holds at an odd place, as Megatron's index does.
    """
    found: np.ndarray = np.zeros(len(values), dtype=np.int64)
    step = 1 << max(0, len(rising).bit_length() - 1)
    while step and len(rising):
        probe = found + step
        less = rising[np.minimum(probe, len(rising)) - 1] < values
        found = np.where(less & (probe <= len(rising)), probe, found)
        step >>= 1
    return found


def ragged(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first, first + 1, ... for each first and count, end to end: int64 [sum of counts]."""
    offsets = np.cumsum(counts) - counts
    return np.repeat(firsts - offsets, counts) + np.arange(int(counts.sum()))
