"""A keyed permutation of [0, n): shuffling without a shuffled list.

`permute(key, n, i)` is a bijection of [0, n) for every key, in O(1) memory: a Feistel network over
the smallest square domain 4^b >= n, applied again while the result falls outside [0, n)
(cycle walking; fewer than 4 rounds on average). Same idea as levanter's `data/permutation.py`.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

ROUNDS = 6


def derive(*parts: int) -> np.ndarray:
    """uint64 [8] words from a hash of `parts`, each -2^63 <= part < 2^63."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8")


def permute(key: np.ndarray, n: int, i: np.ndarray) -> np.ndarray:
    """Images of `i`, int64 [k] in [0, n), under the permutation of `key`, uint64 [>= ROUNDS]."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    out = _feistel(key, half, i.astype(np.uint64))
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(key, half, out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(key: np.ndarray, half: int, x: np.ndarray) -> np.ndarray:
    """A bijection of [0, 4^half) on uint64."""
    shift, mask = np.uint64(half), np.uint64(2**half - 1)
    left, right = x >> shift, x & mask
    for round_key in key[:ROUNDS]:
        left, right = right, left ^ (mix(right + round_key) & mask)
    return left << shift | right


def mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
