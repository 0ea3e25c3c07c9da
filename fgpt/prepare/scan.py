"""Going through a shard from end to end in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fgpt.data.shards import IndexedTokens
from fgpt.errors import DataError

BLOCK_TOKENS = 2**22
DOCUMENTS_AT_ONCE = 2**16


def document_lengths(tokens: IndexedTokens) -> Iterator[np.ndarray]:
    """Tokens of each document, int64, in arrays of up to DOCUMENTS_AT_ONCE."""
    tokens.check_size()
    before = 0
    for first in range(0, tokens.document_count, DOCUMENTS_AT_ONCE):
        behind = tokens.documents[first + 1 : first + 1 + DOCUMENTS_AT_ONCE]
        # where the first sequence of the next document begins
        inside = np.minimum(behind, len(tokens.pointers) - 1)
        ends = tokens.pointers[inside] // tokens.dtype.itemsize
        ends[behind == len(tokens.pointers)] = tokens.tokens
        yield np.diff(ends, prepend=before)
        before = int(ends[-1])


def blocks(tokens: IndexedTokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids end to end, int64; tokens of each document, int64) of runs of whole documents.

    A run has about BLOCK_TOKENS tokens, or one longer document; empty documents are left out.
    Raises DataError if the shard is not what it was at opening.
    """
    with tokens.path.open("rb") as file:
        for lengths in document_lengths(tokens):
            lengths = lengths[lengths > 0]
            if len(lengths) and lengths.max() >= 2**31:
                what = f"a document of {lengths.max()} tokens; 2^31 - 1 are the most"
                raise DataError(f"{tokens.path}: {what}")
            run = np.cumsum(lengths) // BLOCK_TOKENS
            for some in np.split(lengths, np.flatnonzero(np.diff(run)) + 1):
                count = int(some.sum())
                ids = np.fromfile(file, tokens.dtype, count)
                if len(ids) != count:
                    raise DataError(f"{tokens.path}: was cut short while it was read")
                if count:
                    yield ids.astype(np.int64), some
