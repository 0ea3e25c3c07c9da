"""Which keys each query attends to: one mask object, passed to every attention kernel.

B rows, T tokens, N documents in all rows together.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class AttentionMask:
    """Causal attention, restricted to the query's own document if `document_begins` is given, and
    to a sliding window of tokens if `window` is.

    Query i attends to key j if document_begins[i] <= j <= i and j > i - window.

    Built once per forward pass and never modified; derived tensors are cached and shared by all
    layers, recomputed ones included.
    """

    def __init__(self, document_begins: Tensor | None = None, window: int | None = None):
        """`document_begins`: int64 [B, T] on the CPU, the column at which each token's document
        begins. None: each row is one document. `window`: tokens that a query attends to, itself
        included; None: all earlier ones.
        """
        self.document_begins = document_begins
        self.window = window
        self._windowed: dict[int, AttentionMask] = {}
        self._document_mask: Tensor | None = None
        self._begins: Tensor | None = None
        self._cu_seqlens: Tensor | None = None

    def within(self, window: int | None) -> AttentionMask:
        """Return this mask with a window instead of none, for a block that has one."""
        if window is None:
            return self
        if self.document_begins is None:
            return AttentionMask(window=window)  # not kept, as in `dense`
        if window not in self._windowed:
            self._windowed[window] = AttentionMask(self.document_begins, window)
        return self._windowed[window]

    def window_hides(self, n_tokens: int) -> bool:
        """Whether the window hides a token of a row or document of this length."""
        return self.window is not None and self.window < n_tokens

    def dense(self, n_query: int, n_key: int, device: torch.device) -> Tensor:
        """Return the explicit mask, True where attention is allowed.

        bool [n_query, n_key], the queries being the last of the n_key tokens; with documents bool
        [B, 1, T, T], for n_query = n_key = T only.
        """
        if self._document_mask is not None:
            return self._document_mask
        key = torch.arange(n_key, device=device)
        query = torch.arange(n_key - n_query, n_key, device=device)[:, None]
        causal = key <= query
        if self.window is not None:
            causal = causal & (key > query - self.window)
        if self.document_begins is None:
            return causal  # not cached: in a compiled block, a cache would cause recompilation
        assert n_query == n_key  # no KV cache with documents
        begins = self.begins(device)
        self._document_mask = (causal & (key >= begins[..., None]))[:, None]
        return self._document_mask

    def begins(self, device: torch.device) -> Tensor:
        """Return `document_begins` on a device, int32 [B, T]."""
        assert self.document_begins is not None
        if self._begins is None:
            # page-locked by the loader: Python does not wait for the copy
            begins = self.document_begins.to(device, non_blocking=True)
            self._begins = begins.to(torch.int32)
        return self._begins

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """Return the offset of each document in the concatenated rows, and B T: int32 [N + 1]."""
        if self._cu_seqlens is None:
            self._cu_seqlens = self._offsets.to(device, torch.int32, non_blocking=True)
        return self._cu_seqlens

    @cached_property
    def document_lengths(self) -> list[int]:
        """Tokens of each document, N of them."""
        lengths: list[int] = self._offsets.diff().tolist()
        return lengths

    @cached_property
    def max_document_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.document_lengths)

    @cached_property
    def _offsets(self) -> Tensor:
        """int64 [N + 1] on the CPU, so that reading the lengths does not synchronize a GPU."""
        begins = self.document_begins
        assert begins is not None
        is_begin = begins == torch.arange(begins.shape[1])
        return torch.cat((is_begin.flatten().nonzero().flatten(), torch.tensor([begins.numel()])))


CAUSAL = AttentionMask()
"""Each token attends to itself and to all earlier tokens of its row."""
