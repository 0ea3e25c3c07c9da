"""Keyed pseudorandom permutation of [0, n): a shuffled order without a stored index.

`permute(key, n, i)` is a bijection of [0, n) for every key and needs O(1) memory: a Feistel network
on the smallest domain 4^b >= n, applied again while the result is outside [0, n) (cycle walking;
fewer than 4 applications on average). The same method as levanter's `data/permutation.py`.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

ROUNDS = 6


def derive_key(*values: int) -> np.ndarray:
    """Hash integers, each in [-2^63, 2^63), into a key: uint64 [8]."""
    digest = hashlib.blake2b(struct.pack(f"<{len(values)}q", *values), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8")


def permute(key: np.ndarray, n: int, i: np.ndarray) -> np.ndarray:
    """Return the images of `i`, int64 [k] in [0, n), under the permutation of [0, n) that `key`
    selects, uint64 [>= ROUNDS]. If n is a power of 4, each element may have its own key:
    uint64 [>= ROUNDS, k].
    """
    # 1. the domain: two halves of b bits each, 4^b >= n
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    out = _feistel(key, half_bits, i.astype(np.uint64))
    # 2. cycle walking: permute results outside [0, n) again; n may not be a power of 4
    outside = np.flatnonzero(out >= n)
    while outside.size:
        out[outside] = _feistel(key, half_bits, out[outside])
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _feistel(key: np.ndarray, half_bits: int, x: np.ndarray) -> np.ndarray:
    """Return a bijection of [0, 4^half_bits) applied to `x`, uint64.

    Each round swaps the halves and XORs a keyed hash of one into the other, which is invertible for
    any hash.
    """
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    left, right = x >> shift, x & mask
    for round_key in key[:ROUNDS]:
        left, right = right, left ^ (mix64(right + round_key) & mask)
    return left << shift | right


def mix64(x: np.ndarray) -> np.ndarray:
    """Return splitmix64's finalizer of `x`, uint64 (Steele, Lea, Flood 2014): each output bit
    depends on every input bit.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
