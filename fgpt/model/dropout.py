"""Dropout with masks that do not depend on the layout.

A mask bit is a hash of (seed, step, sample, site, coordinates of the element in the full tensor),
so it is the same in one process and on a tensor-, sequence-, context-, pipeline- or data-parallel
rank that holds a shard of the tensor, and the same when activations are recomputed. There is no
generator state to save or restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fgpt.model.context import ForwardContext


class Dropout(nn.Module):
    """In training, zeroes elements of [B, N, ..., C] with probability p and scales the others by
    1 / (1 - p).
    """

    def __init__(self, p: float, site: int, context: ForwardContext):
        """`site`: unique number of this dropout in the model, the same in every layout."""
        super().__init__()
        self.p = p
        self.site = site
        self.context = context
        self.shard_index = 0
        """Index of this layer's input among the equal shards along N (tokens, or heads)."""
        self.drop: Callable[[Tensor, Tensor, float], Tensor] = drop
        """Drops elements of x: `drop`, or the same compiled."""
        self.attention: Callable[..., Tensor] | None = None
        """Of attention weights: the kernel that draws this dropout's mask; None: on any device."""

    @property
    def active(self) -> bool:
        """Whether a forward pass drops anything."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; dimension 0 holds consecutive samples from the context's first one on."""
        if not self.active:
            return x
        return self.drop(x, self.hashes(x.shape[:-1], x.device), self.p)

    def hashes(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return the hash of each element, int32 of `shape`, which may lack trailing dimensions:
        `mix_in` adds their coordinates.
        """
        context = self.context.current
        # 1. hash (seed, step, site) into one int32
        text = f"dropout:{context.seed}:{context.step}:{self.site}"
        digest = hashlib.sha256(text.encode()).digest()
        # a kernel fills it; torch.tensor would copy it to a GPU, and Python would wait for the copy
        number = _to_int32(int.from_bytes(digest[:4], "big"))
        hashed = torch.full((), number, dtype=torch.int32, device=device)  # ()
        # 2. mix in the element's coordinates in the full tensor, one dimension at a time
        offsets = [context.first_sample, self.shard_index * shape[1], *(0 for _ in shape[2:])]
        for size, offset in zip(shape, offsets, strict=True):
            hashed = mix_in(hashed, offset, size)
        return hashed


def drop(x: Tensor, hashes: Tensor, p: float) -> Tensor:
    """Drop elements of x [..., C] with probability p, whose rows have these hashes, int32 [...].

    Its two dozen element-wise operations on int32 take 1 ms for 32 x 1024 x 768 elements at the
    memory's speed of an H100; compiled, they are part of one kernel that reads and writes x.
    """
    return x * is_kept(mix_in(hashes, 0, x.shape[-1]), p) * (1 / (1 - p))


def mix_in(hashes: Tensor, first: int, size: int) -> Tensor:
    """Mix coordinates first .. first + size - 1 of a further dimension into hashes [...]; returns
    int32 [..., size].
    """
    end = first + size
    coordinates = torch.arange(first, end, dtype=torch.int32, device=hashes.device)
    return _mix(hashes[..., None] + coordinates * _GOLDEN)


def is_kept(hashes: Tensor, p: float) -> Tensor:
    """Whether dropout with probability p keeps the elements with these hashes, bool."""
    return hashes >= threshold(p)


def threshold(p: float) -> int:
    """The lowest hash that is kept: the lowest fraction p of the hashes, which are uniform in
    [-2^31, 2^31), is dropped.
    """
    return round(p * (2**32 - 1)) - 2**31


def _to_int32(number: int) -> int:
    """The int32 with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


_GOLDEN = _to_int32(0x9E3779B9)  # odd, so that distinct coordinates stay distinct


def _mix(x: Tensor) -> Tensor:
    """Pseudo-random bijection of int32 ("lowbias32" of C. Wellons' hash-prospector)."""
    x = x ^ ((x >> 16) & 0xFFFF)  # >> extends the sign; the mask removes it
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _to_int32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)
