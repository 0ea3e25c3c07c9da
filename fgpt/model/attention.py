"""Causal self-attention: a reference implementation and the fastest kernels.

B batch, T tokens, S tokens attended to (S = T except in decoding), D d_model, K d_head,
H query heads, G key/value heads, R = H / G query heads per key/value head.

The rows of the fused projection are grouped (q_1 .. q_R, k, v) per key/value head, so a contiguous
slice of whole groups is a smaller attention. The number of heads follows from the projection's
width, so a tensor-parallel rank runs this file unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, Shapes, block_window, query_scale
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.blocked_attention import blocked_attention, supports_blocked_attention
from fgpt.model.kernels.masked_attention import document_attention, window_attention
from fgpt.model.kv_cache import DecodeStep
from fgpt.model.linear import InputProjection, Linear, apply_each, scaled
from fgpt.model.mask import AttentionMask
from fgpt.model.position import Rotary, apply_rotary, rotate

AttentionKernel = Callable[..., Tensor]
"""(q [B, H, T, K], k [B, G, S, K], v [B, G, S, K], mask, dropout or None) -> [B, H, T, K]."""


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    dropout: Dropout | None = None,
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
    dropout: Dropout | None = None,
) -> Tensor:
    """Attend with the fastest kernel that does not materialize all [T, S] scores; arguments as in
    `reference_attention`, its slow twin.

    Not torch's with dropout: its kernels draw masks that depend on the layout.
    """
    if dropout is not None:
        return (dropout.attention or blocked_attention)(q, k, v, mask, dropout)
    if mask.document_begins is not None:
        return document_attention(q, k, v, mask)
    n_query, n_key = q.shape[2], k.shape[2]
    if mask.window_hides(n_key):
        return window_attention(q, k, v, mask)
    if n_query == n_key and supports_blocked_attention(q):
        return blocked_attention(q, k, v, mask)
    gqa = q.shape[1] != k.shape[1]
    # torch's causal flag aligns the first query with the first key: wrong with more keys. Under
    # torch.compile a comparison of sizes may be symbolic, and the flag must be a bool
    if n_query == n_key and n_query > 1:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    dense = None if n_query == 1 else mask.dense(n_query, n_key, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=gqa)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend with the newest T tokens: q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K].

    `mask`: as in `DecodeStep`. The slow twin is a whole forward pass.
    """
    causal = mask is None and q.shape[2] > 1
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


KERNELS: dict[str, AttentionKernel] = {"reference": reference_attention, "sdpa": sdpa_attention}


class Attention(nn.Module):
    """Multi-head or grouped-query attention with a KV cache for decoding."""

    def __init__(self, config: ModelConfig, index: int, dropout: Dropout, context: ForwardContext):
        """`index`: number of the block; `dropout`: applied to the attention weights; `context`: the
        model's.
        """
        super().__init__()
        shapes = Shapes.of(config)
        self.index = index
        self.window = block_window(config, index)
        self.d_head = shapes.d_head
        self.heads_per_group = shapes.n_head // shapes.n_kv_head
        self.qkv = Linear(config.d_model, shapes.d_qkv, bias=config.bias)
        self.out = Linear(shapes.n_head * shapes.d_head, config.d_model, bias=config.bias)
        self.rotary = (
            Rotary(shapes.d_head, config.rotary_base) if config.position == "rotary" else None
        )
        self.q_norm = nn.RMSNorm(shapes.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(shapes.d_head, eps=config.norm_eps) if config.qk_norm else None
        self.query_scale = query_scale(config)
        self.dropout = dropout
        self.context = context
        self.kernel: AttentionKernel = KERNELS[config.attention]
        self.project_input: InputProjection = apply_each
        self.shard_index = 0
        """Index of this layer's input among the equal shards of the sequence."""

    def forward(self, x: Tensor, step: DecodeStep | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `step`: see `GPT.decode`."""
        (qkv,) = self.project_input(x, self.qkv)  # (B, T, D) -> (B, T, (H + 2 G) K)
        if step is not None:
            return self._decode(qkv, step)
        q, k, v = self._split_heads(qkv, self.shard_index * qkv.shape[1])
        dropout = self.dropout if self.dropout.active else None
        mask = self.context.current.mask.within(self.window)
        y = self.kernel(q, k, v, mask, dropout)  # (B, H, T, K)
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
        q = scaled(q, self.query_scale)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _decode(self, qkv: Tensor, step: DecodeStep) -> Tensor:
        """[B, T, (H + 2 G) K] of the newest tokens -> [B, T, D]; keeps their keys and values."""
        per_group = self.heads_per_group
        # 1. heads; one rotation for q and k, whose heads lie side by side
        grouped = qkv.unflatten(-1, (-1, per_group + 2, self.d_head))  # (B, T, G, R + 2, K)
        qk, v = grouped[..., : per_group + 1, :], grouped[..., per_group + 1, :]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((per_group, 1), dim=-2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=-2)
        if self.rotary is not None:
            if step.rotation is None:
                step.rotation = self.rotary.rotation(step.positions, step.n_positions)
            qk = rotate(qk, *step.rotation)
        q = qk[..., :per_group, :].flatten(2, 3).transpose(1, 2)  # (B, H, T, K)
        q = scaled(q, self.query_scale)
        # 2. keys and values of all tokens so far
        k, v = qk[..., per_group, :].transpose(1, 2), v.transpose(1, 2)  # (B, G, T, K)
        k, v = step.append(self.index, k, v)  # (B, G, S, K)
        # 3. attention; all ranks of context parallelism have all tokens here
        if self.window is None or self.window >= step.n_keys:
            y = decode_attention(q, k, v, step.mask)  # (B, H, T, K)
        elif step.mask is None and q.shape[2] > 1:  # a whole text
            y = sdpa_attention(q, k, v, AttentionMask(window=self.window))
        else:
            first, mask = step.within(self.window)
            y = decode_attention(q, k[:, :, first:], v[:, :, first:], mask)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, H K) -> (B, T, D)
