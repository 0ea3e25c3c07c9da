"""Reading shards from end to end in bounded memory, and `fgpt data verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fgpt.data.shards import IndexedTokens, check_id_range
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import DataError

BLOCK_TOKENS = 2**22
BLOCK_DOCUMENTS = 2**16


def iter_document_lengths(tokens: IndexedTokens) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, int64, in arrays of up to BLOCK_DOCUMENTS."""
    tokens.check_size()
    previous_end = 0
    for first in range(0, tokens.document_count, BLOCK_DOCUMENTS):
        # the first sequence of the next document, of each document
        following = tokens.documents[first + 1 : first + 1 + BLOCK_DOCUMENTS]
        in_range = np.minimum(following, len(tokens.pointers) - 1)
        ends = tokens.pointers[in_range] // tokens.dtype.itemsize
        ends[following == len(tokens.pointers)] = tokens.tokens
        yield np.diff(ends, prepend=previous_end)
        previous_end = int(ends[-1])


def iter_document_blocks(tokens: IndexedTokens) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (concatenated ids, int64; tokens of each document, int64) of consecutive documents.

    A block has about BLOCK_TOKENS tokens, or one longer document. Empty documents are omitted.
    Raises DataError if the shard changed since opening.
    """
    with tokens.path.open("rb") as file:
        for lengths in iter_document_lengths(tokens):
            lengths = lengths[lengths > 0]
            if len(lengths) and lengths.max() >= 2**31:
                size = f"a document of {lengths.max()} tokens; the maximum is 2^31 - 1"
                raise DataError(f"{tokens.path}: {size}")
            block = np.cumsum(lengths) // BLOCK_TOKENS
            for block_lengths in np.split(lengths, np.flatnonzero(np.diff(block)) + 1):
                count = int(block_lengths.sum())
                ids = np.fromfile(file, tokens.dtype, count)
                if len(ids) != count:
                    raise DataError(f"{tokens.path}: was truncated while it was read")
                if count:
                    yield ids.astype(np.int64), block_lengths


def verify(path: Path) -> Iterator[str]:
    """Compare all of a data set with its card; yields one line per split.

    Raises DataError for the first difference.
    """
    dataset = open_token_dataset(path, verify=True)
    card = dataset.card
    for name, info in card.splits.items():
        tokens: IndexedTokens = getattr(dataset, name)
        max_id, without_eod = scan_ids(tokens, card.tokenizer.vocab_size, card.tokenizer.eod_id)
        if max_id != info.max_id:
            ids = f"the largest id is {max_id}, but the card says {info.max_id}"
            raise DataError(f"{tokens.path}: {ids}; prepare the data set again")
        ended = "all" if not without_eod else f"all but {without_eod:,}"
        yield (
            f"{path / name}: {info.documents:,} documents, {info.tokens:,} tokens: hashes as in the"
            f" card, ids 0..{max_id} of {card.tokenizer.vocab_size}, {ended} end with the eod id"
        )


def scan_ids(tokens: IndexedTokens, vocab_size: int, eod_id: int) -> tuple[int, int]:
    """Return (largest id, number of documents that do not end with the eod id).

    Raises DataError for an id out of range.
    """
    max_id, without_eod = -1, 0
    for ids, lengths in iter_document_blocks(tokens):
        max_id = max(max_id, check_id_range(ids, vocab_size, str(tokens.path)))
        without_eod += int(np.count_nonzero(ids[np.cumsum(lengths) - 1] != eod_id))
    return max_id, without_eod
