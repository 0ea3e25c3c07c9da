"""Dropout whose masks do not depend on who computes them.

A mask's bit is a hash of (seed, step, sample, site, coordinates of the element in the whole
tensor): the same in one process and on a tensor-, sequence-, context-, pipeline- or data-parallel
rank that sees only a part of the tensor, and the same again when activations are recomputed. No
generator is advanced, so there is none to save, and none for a resumed run to restore.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from fgpt.model.context import ForwardContext


class Dropout(nn.Module):
    """Zeroes elements of [B, N, ..., C] with probability p in training and scales up the rest."""

    def __init__(self, p: float, site: int, context: ForwardContext):
        """`site`: a number for each dropout of the model, the same in every layout."""
        super().__init__()
        self.p = p
        self.site = site
        self.context = context
        self.shard_index = 0
        """Which of the equal parts along N (tokens, or heads) this layer sees."""

    @property
    def active(self) -> bool:
        """Whether a forward pass would drop anything."""
        return self.training and self.p > 0

    def forward(self, x: Tensor) -> Tensor:
        """Same shape; the rows of dimension 0 are the samples from `context` on."""
        if not self.active:
            return x
        return x * self.kept(x.shape, x.device) * (1 / (1 - self.p))

    def kept(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The mask: bool, of this shape."""
        seed, step, first, *_ = self.context.current
        digest = hashlib.sha256(f"dropout:{seed}:{step}:{self.site}".encode()).digest()
        hashed = torch.tensor(_signed(int.from_bytes(digest[:4], "big")), device=device)
        hashed = hashed.to(torch.int32)
        offsets = [first, self.shard_index * shape[1], *(0 for _ in shape[2:])]
        for size, offset in zip(shape, offsets, strict=True):
            coordinate = torch.arange(offset, offset + size, dtype=torch.int32, device=device)
            hashed = _mix(hashed[..., None] + coordinate * _GOLDEN)  # one more dimension
        return hashed >= round(self.p * (2**32 - 1)) - 2**31


def _signed(number: int) -> int:
    """The int32 with the same low 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


_GOLDEN = _signed(0x9E3779B9)  # odd, so that coordinates stay distinct


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 whose bits look random ("lowbias32" of C. Wellons' hash-prospector)."""
    x = x ^ ((x >> 16) & 0xFFFF)  # >> keeps the sign, the mask takes it off
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)
