"""Which keys each query attends to: one mask object, passed to every attention kernel.

B rows, T tokens, N documents in all rows together.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class AttentionMask:
    """Causal attention, restricted to the query's own document if `document_begins` is given.

    Query i attends to key j if document_begins[i] <= j <= i. A sliding window would be one more
    field: a further lower bound in `dense`, excluded from `is_causal_only`, handled by each kernel.

    Built once per forward pass and never modified; derived tensors are cached and shared by all
    layers, recomputed ones included.
    """

    def __init__(self, document_begins: Tensor | None = None):
        """`document_begins`: int64 [B, T] on the CPU, the column at which each token's document
        begins. None: each row is one document.
        """
        self.document_begins = document_begins
        self._document_mask: Tensor | None = None
        self._cu_seqlens: Tensor | None = None

    @property
    def is_causal_only(self) -> bool:
        """True if causality is the only restriction, so that a kernel's causal flag is enough."""
        return self.document_begins is None

    def dense(self, n_query: int, n_key: int, device: torch.device) -> Tensor:
        """Return the explicit mask, True where attention is allowed.

        bool [n_query, n_key], the queries being the last of the n_key tokens; with documents bool
        [B, 1, T, T], for n_query = n_key = T only.
        """
        if self._document_mask is not None:
            return self._document_mask
        key = torch.arange(n_key, device=device)
        causal = key <= torch.arange(n_key - n_query, n_key, device=device)[:, None]
        if self.document_begins is None:
            return causal  # not cached: in a compiled block, a cache would cause recompilation
        assert n_query == n_key  # no KV cache with documents
        begins = self.document_begins.to(device)
        self._document_mask = (causal & (key >= begins[..., None]))[:, None]
        return self._document_mask

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
