"""Causal attention in bf16 on a CPU, with a sliding window, and with dropout: batched matrix
products over blocks of queries.

Torch's fused CPU kernel works on small tiles, where bf16 products are far slower than one large
batched product. Here a block of queries attends to all keys up to the block's end: as there, half
of the work is skipped, and at most `SCORE_BYTES` of scores exist at a time. With a window the keys
before the window of the block's first query are skipped, too. The backward pass recomputes the
scores; only q, k and v are saved for it. The slow twin is `reference_attention`.

With dropout a block draws its own part of the mask, which is a hash of each weight's place
(`fgpt.model.dropout`): the reference's mask, of which no more than a block exists.

B batch, T tokens, K d_head, H query heads, G key/value heads, R = H / G. Per block: Q queries, E
keys (from the first in the window to the block's end), n of the B G key/value heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fgpt.model.cpu_features import multiplies_bf16
from fgpt.model.dropout import Dropout, is_kept, mix_in
from fgpt.model.mask import AttentionMask

SCORE_BYTES = 2**22
"""Bytes of scores per product: few enough to stay in the cache, enough for an efficient product."""
MIN_TOKENS = 128
"""With fewer tokens torch's kernel is as fast or faster."""


def supports_blocked_attention(q: Tensor) -> bool:
    """Whether `blocked_attention` is the fastest kernel without a window for q [.., T, K]."""
    bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return bf16_on_cpu and q.shape[-2] >= MIN_TOKENS and multiplies_bf16()


def blocked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: Dropout | None = None
) -> Tensor:
    """q [B, H, T, K], k and v [B, G, T, K] -> [B, H, T, K], on any device; documents with dropout
    only.

    As in `reference_attention`, scores are rounded to q's precision, softmax is in float32.
    """
    window = mask.window if mask.window_hides(q.shape[2]) else None
    if dropout is None:
        assert mask.document_begins is None
        y: Tensor = _forward(q, k, v, window)
        return y
    hashes = dropout.hashes(q.shape[:3], q.device)  # (B, H, T)
    begins = None if mask.document_begins is None else mask.begins(q.device)
    y = _forward(q, k, v, window, hashes, dropout.p, begins)
    return y


# Operators instead of autograd Functions: opaque to torch.compile and selective recomputation.
@torch.library.custom_op("fgpt::blocked_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    hashes: Tensor | None = None,
    p: float = 0.0,
    begins: Tensor | None = None,
) -> Tensor:
    # 1. fold 1 / sqrt(K) into q; view q as (B G, R, T, K), k and v as (B G, T, K)
    queries, keys, values = _scale_and_group(q, k), k.flatten(0, 1), v.flatten(0, 1)
    y = queries.new_empty(queries.shape)  # (B G, R, T, K), contiguous as register_fake says
    hidden = _Hidden(k.shape[:2], hashes, p, begins)
    for heads, first, begin, end in _blocks(queries.shape, window):
        # 2. softmax of the block's scores against keys first .. end - 1
        q_block, k_block = queries[heads, :, begin:end], keys[heads, first:end]
        earlier = hidden.documents(heads, first, begin, end)
        weights = _attention_weights(q_block, k_block, window, earlier)  # (n, R Q, E)
        # 3. mix the values
        if hashes is not None:
            weights *= hidden.keep(heads, first, begin, end, weights.dtype)
        mixed = weights @ values[heads, first:end]  # (n, R Q, K)
        y[heads, :, begin:end] = mixed.unflatten(1, (-1, end - begin))
    return y.view(q.shape)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("fgpt::blocked_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    hashes: Tensor | None = None,
    p: float = 0.0,
    begins: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = _scale_and_group(q, k), k.flatten(0, 1), v.flatten(0, 1)
    grad = grad.reshape(queries.shape)
    grad_q = queries.new_empty(queries.shape)
    # Keys and values get a gradient from each block: summed in float32, unless there is one block.
    one_block = q.shape[2] <= _block_size(q.shape[2], window)
    grad_k, grad_v = (
        x.new_empty(x.shape) if one_block else x.new_zeros(x.shape, dtype=torch.float32)
        for x in (keys, values)
    )
    hidden = _Hidden(k.shape[:2], hashes, p, begins)
    for heads, first, begin, end in _blocks(queries.shape, window):
        q_block, k_block = queries[heads, :, begin:end], keys[heads, first:end]
        grad_y = grad[heads, :, begin:end].flatten(1, 2)  # (n, R Q, K)
        # 1. recompute the block's weights
        earlier = hidden.documents(heads, first, begin, end)
        weights = _attention_weights(q_block, k_block, window, earlier)  # (n, R Q, E)
        keep = None
        if hashes is not None:
            keep = hidden.keep(heads, first, begin, end, weights.dtype)
        # 2. through the mix: grad_v += weights^T grad_y
        mixed = weights if keep is None else weights * keep
        _accumulate(grad_v[heads, first:end], mixed.transpose(1, 2), grad_y, one_block)
        grad_weights = grad_y @ values[heads, first:end].transpose(1, 2)  # (n, R Q, E)
        if keep is not None:
            grad_weights *= keep
        # 3. through the softmax
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights, -1, weights.dtype
        )
        # 4. through the scores: grad_k += grad_scores^T q, grad_q = grad_scores k
        _accumulate(
            grad_k[heads, first:end], grad_scores.transpose(1, 2), q_block.flatten(1, 2), one_block
        )
        grad_q[heads, :, begin:end] = (grad_scores @ k_block).unflatten(1, (-1, end - begin))
    grad_q *= 1 / math.sqrt(q.shape[-1])
    grad_k, grad_v = (x.to(k.dtype).view(k.shape) for x in (grad_k, grad_v))
    return grad_q.view(q.shape), grad_k, grad_v


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.window, hashes, ctx.p, begins = inputs
    ctx.save_for_backward(q, k, v, hashes, begins)


def _backward_from_saved(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, hashes, begins = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(
        grad, q, k, v, ctx.window, hashes, ctx.p, begins
    )
    return *gradients, None, None, None, None


_forward.register_autograd(_backward_from_saved, setup_context=_save_inputs)


def _block_size(n_tokens: int, window: int | None) -> int:
    """Queries per block: few with a short window, as a block reaches one window further back."""
    if window is not None and window <= 512:
        return 64
    return 128 if n_tokens <= 512 else 256


def _blocks(shape: torch.Size, window: int | None) -> Iterator[tuple[slice, int, int, int]]:
    """(key/value heads, first key, first query, end of queries and keys) of each product, for
    queries of `shape` (B G, R, T, K).
    """
    n_groups, per_group, n_tokens, _ = shape
    size = _block_size(n_tokens, window)
    for begin in range(0, n_tokens, size):
        end = min(begin + size, n_tokens)
        first = 0 if window is None else max(0, begin - window + 1)
        step = max(1, SCORE_BYTES // (2 * per_group * (end - begin) * (end - first)))
        for head in range(0, n_groups, step):
            yield slice(head, head + step), first, begin, end


def _scale_and_group(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, T, K] -> q / sqrt(K), contiguous [B G, R, T, K]."""
    scaled = q.new_empty(q.shape)
    torch.mul(q, 1 / math.sqrt(q.shape[-1]), out=scaled)
    return scaled.view(k.shape[0] * k.shape[1], -1, *q.shape[2:])


class _Hidden:
    """What of a block's scores documents hide, and which of its weights dropout keeps."""

    def __init__(
        self,
        groups: Sequence[int],
        hashes: Tensor | None,
        p: float,
        begins: Tensor | None,
    ):
        """`groups`: (B, G); `hashes`: of the queries' places, int32 [B, H, T]; `begins`: the column
        at which each token's document begins, [B, T].
        """
        _, n_groups = groups
        self.p = p
        self.hashes = None if hashes is None else hashes.unflatten(1, (n_groups, -1)).flatten(0, 1)
        self.begins = None if begins is None else begins.repeat_interleave(n_groups, dim=0)

    def documents(self, heads: slice, first: int, begin: int, end: int) -> Tensor | None:
        """Whether a key is before the query's document, bool [n, 1, Q, E]; None: no documents."""
        if self.begins is None:
            return None
        keys = torch.arange(first, end, device=self.begins.device)
        return (keys < self.begins[heads, begin:end, None])[:, None]

    def keep(self, heads: slice, first: int, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """The factor of each weight: 1 / (1 - p), or 0; [n, R Q, E]."""
        assert self.hashes is not None
        hashes = mix_in(self.hashes[heads, :, begin:end], first, end - first)  # (n, R, Q, E)
        return is_kept(hashes, self.p).to(dtype).mul_(1 / (1 - self.p)).flatten(1, 2)


def _attention_weights(
    queries: Tensor, keys: Tensor, window: int | None, earlier: Tensor | None = None
) -> Tensor:
    """Softmax of the causal scores: scaled [n, R, Q, K], [n, E, K] -> [n, R Q, E].

    `earlier`: bool [n, 1, Q, E], what is hidden besides.
    """
    scores = queries.flatten(1, 2) @ keys.transpose(1, 2)
    n_queries, n_keys = queries.shape[2], keys.shape[1]
    by_query = scores.unflatten(1, (-1, n_queries))  # (n, R, Q, E), a view
    hidden = scores.new_full((n_queries, n_queries), -math.inf)
    # only the last Q keys can be later than a query
    by_query[..., n_keys - n_queries :] += hidden.triu(1)
    # query a is key E - Q + a: its window hides key b if b <= E - Q + a - window, of which only
    # the first Q can be
    if window is not None and n_keys > window:
        by_query[..., :n_queries] += hidden.tril(n_keys - n_queries - window)
    if earlier is not None:
        by_query.masked_fill_(earlier, -math.inf)
    return scores.softmax(dim=-1)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, one_block: bool) -> None:
    """total += a b; with one block total = a b, without an intermediate tensor."""
    if one_block:
        torch.bmm(a, b, out=total)
    else:
        total += a @ b
