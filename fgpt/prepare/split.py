"""Assignment of documents to train, validation and test by their content.

The key of a document is a hash of the seed and its text, uniform on [0, 2^64). Keys below
`SplitBoundaries.valid` are validation, those from there to `test` are test, the rest is training.
So the assignment depends neither on the order of documents nor on the number of workers, and equal
texts are in the same split: no evaluation text is trained on.

Few or very unequal documents would give a split of a few tokens, or most of the text to validation:
then the boundaries move (`split_boundaries`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import xxhash

from fgpt.data.permutation import derive_key, mix64
from fgpt.errors import DataError

SAMPLE_TOKENS = 256
"""Tokens per sample of the small model presets."""
SPLIT_TOKENS = 5 * SAMPLE_TOKENS
"""Fewest tokens of a validation or test split: four samples and their targets; a fifth of the
tokens of a corpus that has fewer than five times as many."""
KEYS = 2**64

text_hash = xxhash.xxh3_128_digest
"""Hash of a text's UTF-8 bytes, 16 bytes: XXH3-128, in a tenth of SHA-256's time."""


def split_keys(seed: int, digests: np.ndarray) -> np.ndarray:
    """Return the keys, uint64 [n], of documents with these text hashes, uint8 [n, 16]."""
    heads = np.ascontiguousarray(digests[:, :8]).view("<u8")[:, 0]
    return mix64(heads ^ derive_key(seed)[0])


Documents = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
"""Returns all documents in blocks: keys, uint64 [n], and tokens, int [n]. Called several times."""


@dataclass(frozen=True)
class SplitBoundaries:
    """The ranges of keys of the splits."""

    valid: int  # keys below are validation
    test: int  # keys in [valid, test) are test; equal to `valid` without a test split
    start: int = 0
    """The key that counts as 0; those below it come last. Not 0 only if a long document would else
    be validation."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the splits, by the numbers that `assign` returns."""
        return ("train", "valid", "test") if self.test > self.valid else ("train", "valid")

    def assign(self, keys: np.ndarray) -> np.ndarray:
        """Return 0 (training), 1 (validation) or 2 (test) for each of `keys`, uint64 [n]."""
        keys = keys - np.uint64(self.start)  # modulo 2^64
        # compare with boundary - 1: a boundary may be 2^64
        below_valid, below_test = (keys <= np.uint64(end - 1) for end in (self.valid, self.test))
        return np.where(below_valid, 1, np.where(below_test, 2, 0))


def nominal_boundaries(valid: float, test: float) -> SplitBoundaries:
    """Return the boundaries for these fractions; `split_boundaries` rarely differ."""
    end_valid = max(1, int(valid * KEYS))
    return SplitBoundaries(end_valid, end_valid + int(test * KEYS))


def split_boundaries(valid: float, test: float, documents: Documents) -> SplitBoundaries:
    """Return the boundaries for these fractions, moved where they would give unusable splits.

    Each split has a document. If the corpus allows, validation and test have SPLIT_TOKENS, and
    training has at least half of the tokens that the fractions leave to it. Raises DataError if
    there are fewer distinct documents than splits.
    """
    total, longest_key = _measure(documents())
    enough, after_longest = max(1, min(SPLIT_TOKENS, total // 5)), (longest_key + 1) % KEYS
    attempts = (
        (0, 1, enough),  # the fractions: nearly always right
        (0, enough, enough),  # longer validation and test splits
        (after_longest, enough, enough),  # the same, with the longest document in training
        (0, 1, 0),  # short splits
        (after_longest, 1, 0),
    )
    for start, tokens, required in attempts:
        boundaries = _boundaries(valid, test, documents, start, tokens)
        train, *others = _tokens_of_splits(boundaries, documents())
        if train >= (1 - valid - test) / 2 * total and min(others) >= required:
            return boundaries
    return _boundaries(valid, test, documents, 0, 1)


def _measure(documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Return the number of tokens, and the key of the longest document."""
    total, longest, longest_key = 0, -1, 0
    for keys, tokens in documents:
        if len(keys):
            total += int(tokens.sum(dtype=np.int64))
            i = int(tokens.argmax())
            if tokens[i] > longest:
                longest, longest_key = int(tokens[i]), int(keys[i])
    return total, longest_key


def _tokens_of_splits(
    boundaries: SplitBoundaries, documents: Iterable[tuple[np.ndarray, np.ndarray]]
) -> list[int]:
    """Return the tokens of each split, in the order of `boundaries.names`."""
    sizes = np.zeros(len(boundaries.names), np.int64)
    for keys, tokens in documents:
        splits = boundaries.assign(keys)
        for number in range(len(sizes)):
            sizes[number] += tokens[splits == number].sum(dtype=np.int64)
    return sizes.tolist()


def _boundaries(
    valid: float, test: float, documents: Documents, start: int, tokens: int
) -> SplitBoundaries:
    """Return boundaries that give validation and test `tokens` tokens, and training a document.

    Raises DataError if there are fewer distinct documents than splits.
    """

    def rotated() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for keys, lengths in documents():
            yield keys - np.uint64(start), lengths

    # 1. validation has at least the lowest keys
    end_valid = max(nominal_boundaries(valid, test).valid, _end_of_lowest(rotated(), 0, tokens))
    # 2. test has at least the lowest keys after validation's
    end_test = end_valid
    if test > 0:
        nominal = end_valid + int(test * KEYS)
        end_test = max(nominal, _end_of_lowest(rotated(), end_valid, tokens))
    # 3. training has at least the highest key: else test (if any) and training get one key each
    splits = 3 if test > 0 else 2
    top = _highest_keys(splits, rotated())
    if top[-1] < end_test:
        end_valid, end_test = (top[-2], top[-1]) if splits == 3 else (top[-1], top[-1])
    return SplitBoundaries(end_valid, end_test, start)


def _end_of_lowest(
    documents: Iterable[tuple[np.ndarray, np.ndarray]], at_least: int, tokens: int
) -> int:
    """Return the end of the lowest keys >= `at_least` whose documents have `tokens` tokens; of all
    keys, if they have fewer.
    """
    lowest: np.ndarray = np.zeros(0, np.uint64)
    sizes: np.ndarray = np.zeros(0)
    for keys, lengths in documents:
        is_low = keys >= np.uint64(at_least) if at_least < KEYS else np.zeros(len(keys), bool)
        if sizes.sum() >= tokens:
            is_low &= keys <= lowest[-1]
        lowest, places = np.unique(np.concatenate((lowest, keys[is_low])), return_inverse=True)
        sizes = np.bincount(places, np.concatenate((sizes, lengths[is_low])), len(lowest))
        kept = int(np.searchsorted(np.cumsum(sizes), tokens)) + 1
        lowest, sizes = lowest[:kept], sizes[:kept]
    return int(lowest[-1]) + 1 if len(lowest) else at_least


def _highest_keys(count: int, documents: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    """Return the `count` highest distinct keys, ascending. Raises DataError if there are fewer."""
    distinct = np.zeros(0, np.uint64)
    for keys, _ in documents:
        if len(distinct) == count:
            keys = keys[keys > distinct[0]]
        distinct = np.unique(np.concatenate((distinct, keys)))[-count:]
    if len(distinct) < count:
        raise DataError(
            f"the corpus has {len(distinct)} distinct document{'s' * (len(distinct) != 1)}, a split"
            f" by document needs {count}; add documents, or cut text files into several with"
            " --document_separator (source.document_separator)"
        )
    return [int(key) for key in distinct]
