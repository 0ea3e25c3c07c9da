"""Train or validation, for each document by its content: order and workers do not matter.

The key of a document is a hash of (seed, SHA-256 of its text), uniform on [0, 2^64). Documents with
a key below `limit` are validation. Equal texts fall on the same side: nothing trained on is
evaluated.
"""

from __future__ import annotations

import hashlib

from fgpt.errors import DataError


def text_digest(text: str) -> bytes:
    """SHA-256 of a document's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).digest()


def split_key(seed: int, digest: bytes) -> int:
    """Key of the document with this digest, 0 <= key < 2^64."""
    key = hashlib.blake2b(digest, digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(key.digest(), "little")


def split_limit(fraction: float, smallest: int, largest: int) -> int:
    """Limit for `fraction` of the documents, moved so that each side has at least one.

    `smallest`, `largest`: extreme keys of the corpus. Raises DataError if all documents are equal.
    """
    if smallest == largest:
        fix = "set source.document_separator (--document_separator) to cut the text into documents"
        raise DataError(f"the corpus has 1 distinct document, a split by document needs 2; {fix}")
    return min(max(int(fraction * 2**64), smallest + 1), largest)
