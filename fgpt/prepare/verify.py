"""`fgpt data verify`: read everything, and compare it with the card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fgpt.data.shards import IndexedTokens, check_range
from fgpt.data.token_dataset import open_token_dataset
from fgpt.errors import DataError
from fgpt.prepare.scan import blocks


def verify(path: Path) -> Iterator[str]:
    """One line for each split that holds what the card says: hashes, ids, ends of documents.

    Raises DataError for the first that does not.
    """
    prepared = open_token_dataset(path, verify=True)
    card = prepared.card
    for name, info in card.splits.items():
        tokens: IndexedTokens = getattr(prepared, name)
        largest, not_ended = survey(tokens, card.tokenizer.vocab_size, card.tokenizer.eod_id)
        if largest != info.max_id:
            what = f"its largest id is {largest}, but the card says {info.max_id}"
            raise DataError(f"{tokens.path}: {what}; prepare the data set again")
        ended = "all" if not not_ended else f"all but {not_ended:,}"
        yield (
            f"{path / name}: {info.documents:,} documents, {info.tokens:,} tokens: hashes as in the"
            f" card, ids 0..{largest} of {card.tokenizer.vocab_size}, {ended} end with the eod id"
        )


def survey(tokens: IndexedTokens, vocab_size: int, eod_id: int) -> tuple[int, int]:
    """(largest id, documents that do not end with the eod id). Raises DataError out of range."""
    largest, not_ended = -1, 0
    for ids, lengths in blocks(tokens):
        largest = max(largest, check_range(ids, vocab_size, str(tokens.path)))
        not_ended += int(np.count_nonzero(ids[np.cumsum(lengths) - 1] != eod_id))
    return largest, not_ended
