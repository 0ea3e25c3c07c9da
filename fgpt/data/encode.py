"""Documents -> the two shards of a data set, in batches over the tokenizer's threads.

The ids of a document do not depend on the batch it is in, so neither the batch size nor the number
of threads changes a byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fgpt.data.decode import Document
from fgpt.data.shards import ShardInfo, ShardWriter
from fgpt.data.split import split_key, text_digest
from fgpt.data.tokenizer import Tokenizer

BATCH_CHARS = 2**22


def encode_splits(
    documents: Iterable[Document], seed: int, limit: int, tokenizer: Tokenizer, folder: Path
) -> tuple[ShardInfo, ShardInfo]:
    """Write FOLDER/train and FOLDER/valid; returns what each holds, in this order.

    Each document ends with the eod id; those with a split key below `limit` are validation.
    """
    size = tokenizer.vocab_size
    with ShardWriter(folder / "train", size) as train, ShardWriter(folder / "valid", size) as valid:
        for batch in _batches(documents):
            for document, ids in zip(batch, _encode(batch, tokenizer), strict=True):
                held_out = split_key(seed, text_digest(document.text)) < limit
                (valid if held_out else train).add(ids)
        return train.close(), valid.close()


def _encode(batch: list[Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Ids of each document, int64 [its tokens + 1], closed by the eod id."""
    eod = np.array([tokenizer.eod_id])
    for ids in tokenizer.encode_batch([document.text for document in batch]):
        yield np.concatenate([ids, eod])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of about BATCH_CHARS characters: work for every thread, bounded memory."""
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
