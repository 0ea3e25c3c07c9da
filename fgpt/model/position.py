"""Positions: sinusoidal and rotary embeddings. The learned table is in `embedding.py`.

B batch, T tokens, H heads, K d_head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal_embedding(positions: Tensor, width: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5: positions [...] -> float32 [..., width]."""
    position = positions.float()[..., None]
    half = (width + 1) // 2
    pair = torch.arange(half, device=positions.device, dtype=torch.float32)
    rate = 10000.0 ** (-2 * pair / width)
    rows = position.new_zeros(*positions.shape, width)
    rows[..., 0::2] = torch.sin(position * rate)
    rows[..., 1::2] = torch.cos(position * rate[: width // 2])
    return rows


class Rotary:
    """Rotary positions (Su et al. 2021), in the half-split layout of GPT-NeoX and Llama.

    Not a module: the tables stay float32 when the model is cast (bf16 cannot represent positions
    beyond 256), and they are recomputed instead of saved.
    """

    def __init__(self, d_head: int, base: float):
        self.d_head = d_head
        self.base = base
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cos and sin of every angle: float32 [length, K / 2] each."""
        cached = self._tables
        if cached is None or cached[0].shape[0] < length or cached[0].device != device:
            pair = torch.arange(0, self.d_head, 2, device=device, dtype=torch.float32)
            rate = self.base ** (-pair / self.d_head)
            angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rate
            self._tables = cached = (angle.cos(), angle.sin())
        return cached[0][:length], cached[1][:length]

    def cos_sin(
        self, offset: int, length: int, device: torch.device, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return cos and sin of `length` tokens from column `offset` on: [T, 1, K/2] each.

        With `positions`, int64 [B, full row], [B, T, 1, K/2] each.
        """
        end = offset + length
        if positions is None:
            cos, sin = self.tables(end, device)
            return cos[offset:, None], sin[offset:, None]
        cos, sin = self.tables(positions.shape[1], device)
        local = positions[:, offset:end]
        return cos[local][:, :, None], sin[local][:, :, None]

    def rotation(self, positions: Tensor, n_positions: int) -> tuple[Tensor, Tensor]:
        """Return (cos, cos) and (-sin, sin) of positions for `rotate`: [B, T, 1, 1, K] each.

        `positions`: int64 [B, T], below `n_positions`.
        """
        cos, sin = (table[positions] for table in self.tables(n_positions, positions.device))
        pairs = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return pairs[0][:, :, None, None], pairs[1][:, :, None, None]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j + K/2}) of x [B, T, H, K] by its token's angle."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate x [B, T, G, R, K] as `apply_rotary`, its slow twin, in fewer operations, for decoding.

    `cos`, `signed_sin`: see `Rotary.rotation`.
    """
    exact = x.float()
    swapped = exact.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(exact * cos, swapped, signed_sin).to(x.dtype)
