"""Causal self-attention: a reference implementation and the fastest kernels.

B batch, T new tokens, S tokens attended to (S = T without a KV cache), D d_model, K d_head,
H query heads, G key/value heads, R = H / G query heads per key/value head.

The rows of the fused projection are grouped (q_1 .. q_R, k, v) per key/value head, so a contiguous
slice of whole groups is a smaller attention. The number of heads follows from the projection's
width, so a tensor-parallel rank runs this file unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.blocked_attention import blocked_attention, supports_blocked_attention
from fgpt.model.kernels.document_attention import document_attention
from fgpt.model.kv_cache import LayerCache
from fgpt.model.linear import InputProjection, Linear, apply_each
from fgpt.model.mask import AttentionMask
from fgpt.model.position import Rotary, apply_rotary

AttentionKernel = Callable[..., Tensor]
"""(q [B, H, T, K], k [B, G, S, K], v [B, G, S, K], mask, dropout or None) -> [B, H, T, K]."""


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v (Vaswani et al. 2017, section 3.2.1): the slow twin of
    every other kernel.

    q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K]. Softmax in float32; `dropout` applies to
    the attention weights [B, H, T, S].
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, K)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    allowed = mask.dense(q.shape[2], k.shape[2], q.device)
    weights = scores.float().masked_fill(~allowed, -math.inf).softmax(dim=-1).to(q.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v  # (B, H, T, K)


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attend with the fastest kernel that does not materialize all [T, S] scores; arguments as in
    `reference_attention`, its slow twin.

    With dropout this is the reference: torch's kernels draw masks that depend on the layout.
    """
    if dropout is not None:
        return reference_attention(q, k, v, mask, dropout)
    if mask.document_begins is not None:
        return document_attention(q, k, v, mask)
    n_query, n_key = q.shape[2], k.shape[2]
    if n_query == n_key and supports_blocked_attention(q, mask):
        return blocked_attention(q, k, v, mask)
    gqa = q.shape[1] != k.shape[1]
    # torch's causal flag aligns the first query with the first key: wrong with a KV cache. Under
    # torch.compile a comparison of sizes may be symbolic, and the flag must be a bool
    if n_query == n_key and n_query > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    dense = None if n_query == 1 else mask.dense(n_query, n_key, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=gqa)


KERNELS: dict[str, AttentionKernel] = {"reference": reference_attention, "sdpa": sdpa_attention}


class Attention(nn.Module):
    """Multi-head or grouped-query attention with a KV cache for decoding."""

    def __init__(self, config: ModelConfig, dropout: Dropout, context: ForwardContext):
        """`dropout`: applied to the attention weights; `context`: the model's."""
        super().__init__()
        shapes = Shapes.of(config)
        self.d_head = shapes.d_head
        self.heads_per_group = shapes.n_head // shapes.n_kv_head
        self.qkv = Linear(config.d_model, shapes.d_qkv, bias=config.bias)
        self.out = Linear(shapes.n_head * shapes.d_head, config.d_model, bias=config.bias)
        self.rotary = (
            Rotary(shapes.d_head, config.rotary_base) if config.position == "rotary" else None
        )
        self.q_norm = nn.RMSNorm(shapes.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(shapes.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.dropout = dropout
        self.context = context
        self.kernel: AttentionKernel = KERNELS[config.attention]
        self.project_input: InputProjection = apply_each
        self.shard_index = 0
        """Index of this layer's input among the equal shards of the sequence."""

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, which holds the earlier tokens, T newest tokens."""
        (qkv,) = self.project_input(x, self.qkv)  # (B, T, D) -> (B, T, (H + 2 G) K)
        start = self.shard_index * qkv.shape[1] if cache is None else cache.length
        q, k, v = self._split_heads(qkv, start)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, K)
        dropout = self.dropout if self.dropout.active else None
        y = self.kernel(q, k, v, self.context.current.mask, dropout)  # (B, H, T, K)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, H K) -> (B, T, D)

    def _split_heads(self, qkv: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, (H + 2 G) K], from column `offset` on -> q [B, H, T, K], k and v [B, G, T, K]."""
        per_group = self.heads_per_group
        grouped = qkv.unflatten(-1, (-1, per_group + 2, self.d_head))  # (B, T, G, R + 2, K)
        # one split: its gradient is one copy; that of three slices is three copies and two sums
        parts = grouped.split((per_group, 1, 1), dim=-2)
        q, k, v = (part.flatten(2, 3) for part in parts)  # (B, T, H, K), (B, T, G, K) twice
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            positions = self.context.current.positions
            cos, sin = self.rotary.cos_sin(offset, q.shape[1], q.device, positions)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
