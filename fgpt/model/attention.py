"""Causal self-attention, twice: written out, and on torch's fused kernel.

B batch, T new tokens, S tokens seen (S = T without a cache), D d_model, K d_head,
H query heads, G key/value heads, R = H / G query heads to each of them.

The fused projection lays its rows out group by group, (q_1 .. q_R, k, v) for each key/value head,
so that any contiguous part holding whole groups is a smaller attention: the number of heads is read
off the projection's width, never looked up, and a tensor-parallel rank runs this file unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgpt.config.schema import ModelConfig, Shapes
from fgpt.model.context import ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels.blocked_attention import blocked_attention, blocked_fits
from fgpt.model.kernels.document_attention import document_attention
from fgpt.model.kv_cache import LayerCache
from fgpt.model.linear import InputProjection, Linear, apply_each
from fgpt.model.mask import Documents
from fgpt.model.position import Rotary, turned


def causal_mask(n_query: int, n_key: int, device: torch.device) -> Tensor:
    """bool [n_query, n_key]: query i, the last of n_key - n_query + i + 1 tokens, sees those."""
    query = torch.arange(n_key - n_query, n_key, device=device)[:, None]
    return query >= torch.arange(n_key, device=device)


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K) + mask) v, written out (Vaswani et al. 2017, section 3.2.1).

    q [B, H, T, K], k and v [B, G, S, K] -> [B, H, T, K]. The softmax is taken in float32.
    `dropout` is applied to the weights [B, H, T, S]. With `documents` (and S = T) a token sees its
    own document only.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)  # (B, H, S, K)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    mask = causal_mask(q.shape[2], k.shape[2], q.device) if documents is None else documents.mask
    weights = scores.float().masked_fill(~mask, -math.inf).softmax(dim=-1).to(q.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return weights @ v  # (B, H, T, K)


def sdpa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: Callable[[Tensor], Tensor] | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """The same by the fastest kernel that never holds all [T, S] scores.

    That is torch's own, but for bf16 on a CPU (`blocked_attention`). Torch's would draw dropout
    masks of their own, other ones on other ranks: with dropout the written out form is taken.
    """
    if dropout is not None:
        return reference_attention(q, k, v, dropout, documents)
    if documents is not None:
        return document_attention(q, k, v, documents)
    n_query, n_key = q.shape[2], k.shape[2]
    square = n_query == n_key
    if square and blocked_fits(q):
        return blocked_attention(q, k, v)
    mask = None if square or n_query == 1 else causal_mask(n_query, n_key, q.device)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=square and n_query > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


Kernel = Callable[
    [Tensor, Tensor, Tensor, "Callable[[Tensor], Tensor] | None", "Documents | None"], Tensor
]
KERNELS: dict[str, Kernel] = {"reference": reference_attention, "sdpa": sdpa_attention}


class Attention(nn.Module):
    """Multi-head or grouped-query attention with a KV cache for decoding."""

    def __init__(self, config: ModelConfig, dropout: Dropout, context: ForwardContext):
        """`dropout`: that of the attention weights; `context`: the model's."""
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
        self.kernel = KERNELS[config.attention]
        self.project_input: InputProjection = apply_each
        self.shard_index = 0
        """Which of the equal parts of the sequence this layer's input is."""

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; with a cache, x are the T newest tokens and the rest is in it."""
        (qkv,) = self.project_input(x, self.qkv)  # (B, T, D) -> (B, T, (H + 2 G) K)
        start = self.shard_index * qkv.shape[1] if cache is None else cache.length
        q, k, v = self.heads(qkv, start)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, K)
        dropout = self.dropout if self.dropout.active else None
        y = self.kernel(q, k, v, dropout, self.context.current.documents)  # (B, H, T, K)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, H K) -> (B, T, D)

    def heads(self, qkv: Tensor, offset: int) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, (H + 2 G) K] -> q [B, H, T, K], k and v [B, G, T, K]; the first token stands at
        `offset`.
        """
        per_group = self.heads_per_group
        grouped = qkv.unflatten(-1, (-1, per_group + 2, self.d_head))  # (B, T, G, R + 2, K)
        # one split: its gradient is one copy, that of three slices three and two sums
        parts = grouped.split((per_group, 1, 1), dim=-2)
        q, k, v = (part.flatten(2, 3) for part in parts)  # (B, T, H, K), (B, T, G, K) twice
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            angles = self.rotary.angles(
                offset, q.shape[1], q.device, self.context.current.positions
            )
            q, k = turned(q, *angles), turned(k, *angles)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
