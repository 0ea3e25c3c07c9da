"""8-bit optimizer states, as bitsandbytes keeps them (Dettmers et al. 2021, block-wise dynamic
quantization): codes [N], uint8, and a float32 scale for each block of 256 values;
value = codebook[code] * scale.

A state that moves to another layout meets other blocks there. `quantize` takes a bound for each
value, the scale that it had: a block with the same values as before gets the same scale and the
same codes, bit for bit; a block of several former ones gets the largest of their scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Values with one scale."""


def scale_of_each(scales: Tensor, phase: int, n: int) -> Tensor:
    """Return the scales of `n` consecutive values [n]; the first is number `phase` of its block."""
    return scales.repeat_interleave(BLOCK)[phase : phase + n]


def dequantize(codes: Tensor, codebook: Tensor, scale: Tensor) -> Tensor:
    """Return the values of uint8 codes [N], float32; `scale` [N] is that of each."""
    return codebook[codes.int()] * scale


def quantize(values: Tensor, bounds: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [N] and scales [ceil(N / 256)] of float32 values [N]; |value| <= bounds [N]."""
    # 1. the scale of each block
    n_blocks = -(-len(values) // BLOCK)
    padded = bounds.new_zeros(n_blocks * BLOCK)
    padded[: len(bounds)] = bounds
    scales = padded.view(n_blocks, BLOCK).amax(dim=1)
    # 2. the nearest code; a block of zeros has scale 0
    scale = scale_of_each(scales, 0, len(values))
    relative = torch.where(scale > 0, values / scale, 0.0)
    middles = (codebook[1:] + codebook[:-1]) / 2
    return torch.bucketize(relative, middles).to(torch.uint8), scales
