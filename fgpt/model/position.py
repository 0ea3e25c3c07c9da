"""Where a token stands: a learned table, a fixed sinusoidal table, or rotations of q and k.

B batch, T tokens, H heads, K = width of one head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal_table(length: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """The table of Vaswani et al. 2017, section 3.5: float32 [length, width]."""
    position = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    half = (width + 1) // 2
    rate = 10000.0 ** (-2 * torch.arange(half, device=device, dtype=torch.float32) / width)
    table = torch.zeros(length, width, device=device)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table


class Rotary:
    """Rotary positions (Su et al. 2021), in the two-halves layout of GPT-NeoX and Llama.

    Not a module: its tables are float32 whatever the precision of the model (bf16 cannot count
    positions beyond 256): they must not follow `model.bfloat16()`, and are rebuilt, not saved.
    """

    def __init__(self, d_head: int, base: float):
        self.d_head = d_head
        self.base = base
        self._tables: tuple[Tensor, Tensor] | None = None

    def tables(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle: float32 [length, d_head / 2] each."""
        known = self._tables
        if known is None or known[0].shape[0] < length or known[0].device != device:
            pair = torch.arange(0, self.d_head, 2, device=device, dtype=torch.float32)
            rate = self.base ** (-pair / self.d_head)
            angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * rate
            self._tables = known = (angle.cos(), angle.sin())
        return known[0][:length], known[1][:length]

    def angles(
        self, offset: int, length: int, device: torch.device, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin for `length` tokens from place `offset` of their row on, the same for all
        heads: [T, 1, K/2] each. With `positions`, int64 [B, whole row], [B, T, 1, K/2] each.
        """
        end = offset + length
        if positions is None:
            cos, sin = self.tables(end, device)
            return cos[offset:, None], sin[offset:, None]
        cos, sin = self.tables(positions.shape[1], device)
        mine = positions[:, offset:end]
        return cos[mine][:, :, None], sin[mine][:, :, None]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (x_j, x_{j + K/2}) of `x` [B, T, H, K], turned by its token's angle."""
    first, second = x.float().chunk(2, dim=-1)
    both = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return both.to(x.dtype)
