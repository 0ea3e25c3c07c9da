"""Rows of several documents that do not attend to each other.

B rows, T tokens, N documents in all rows together.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """Where the documents of a micro-batch begin.

    Made once for each forward pass: what attention needs of it is worked out once for all layers,
    and again for none of those that are recomputed.
    """

    def __init__(self, begins: Tensor, device: torch.device):
        """`begins`: int64 [B, T] on the CPU, the column at which each token's document begins;
        `device`: the model's.
        """
        self.begins = begins
        self.device = device

    @cached_property
    def mask(self) -> Tensor:
        """bool [B, 1, T, T]: query i sees key j if begins[i] <= j <= i."""
        begins = self.begins.to(self.device)
        column = torch.arange(begins.shape[1], device=self.device)
        causal = column <= column[:, None]
        return (causal & (column >= begins[..., None]))[:, None]

    @cached_property
    def bounds(self) -> Tensor:
        """int32 [N + 1]: where each document begins, all rows end to end; the last entry is B T."""
        return self._bounds.to(self.device, torch.int32, non_blocking=True)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document, N of them."""
        lengths: list[int] = self._bounds.diff().tolist()
        return lengths

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def _bounds(self) -> Tensor:
        """int64 [N + 1], on the CPU, so that a GPU need not be waited for."""
        first = self.begins == torch.arange(self.begins.shape[1])
        end = torch.tensor([self.begins.numel()])
        return torch.cat((first.flatten().nonzero().flatten(), end))
