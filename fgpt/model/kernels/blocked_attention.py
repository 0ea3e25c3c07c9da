"""Causal attention in bf16 on a CPU, by matrix products over blocks of queries.

Torch's fused kernel for a CPU works on small tiles, where bf16 products are far from the speed they
reach in one batched product. Here a block of queries meets all keys up to its end: half of the
work is left out, as there, and no more than `SCORE_BYTES` of scores are held at a time. The
backward pass works them out once more; nothing but q, k and v is kept for it.

B batch, T tokens, K width of a head, H query heads, G key/value heads, R = H / G; Q queries of a
block, E keys up to its end, n of all B G key/value heads at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fgpt.model.cpu_features import multiplies_bf16

SCORE_BYTES = 2**22
"""Of scores held at a time; they should stay in the cache, and be many for one product."""
MIN_TOKENS = 128
"""For fewer torch's kernel takes as long, or less."""


def blocked_fits(q: Tensor) -> bool:
    """Whether this is the fast way for queries [.., T, K]: bf16 on a CPU that multiplies it."""
    half_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return half_on_cpu and q.shape[-2] >= MIN_TOKENS and multiplies_bf16()


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, H, T, K], k and v [B, G, T, K] -> [B, H, T, K]: causal, on any device.

    Scores are rounded to q's precision, as in `reference_attention`; their softmax is taken in
    float32.
    """
    y: Tensor = _forward(q, k, v)
    return y


# Operators, not autograd Functions: torch.compile and selective recomputation take them whole.
@torch.library.custom_op("fgpt::blocked_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n_groups = k.shape[0] * k.shape[1]
    scaled, keys, values = _scaled(q, n_groups), _heads(k), _heads(v)
    y = torch.empty_like(scaled)  # (B G, R, T, K)
    for some, begin, end in _blocks(*scaled.shape[:3]):
        weights = _weights(scaled[some, :, begin:end], keys[some, :end])
        mixed = weights @ values[some, :end]  # (n, R Q, K)
        y[some, :, begin:end] = mixed.unflatten(1, (-1, end - begin))
    return y.view(q.shape)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("fgpt::blocked_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n_groups = k.shape[0] * k.shape[1]
    scaled, keys, values = _scaled(q, n_groups), _heads(k), _heads(v)
    grad = grad.reshape(scaled.shape)
    towards_q = torch.empty_like(scaled)
    once = q.shape[2] <= _block_size(q.shape[2])  # one block: each key is met once
    towards_k, towards_v = (_sums(x, once) for x in (keys, values))
    for some, begin, end in _blocks(*scaled.shape[:3]):
        queries, seen = scaled[some, :, begin:end], keys[some, :end]
        mine = grad[some, :, begin:end].flatten(1, 2)  # (n, R Q, K)
        weights = _weights(queries, seen)  # (n, R Q, E)
        _add(towards_v[some, :end], weights.transpose(1, 2), mine, once)
        towards_weights = mine @ values[some, :end].transpose(1, 2)
        towards_scores = torch.ops.aten._softmax_backward_data(
            towards_weights, weights, -1, weights.dtype
        )
        _add(towards_k[some, :end], towards_scores.transpose(1, 2), queries.flatten(1, 2), once)
        towards_q[some, :, begin:end] = (towards_scores @ seen).unflatten(1, (-1, end - begin))
    towards_q *= 1 / math.sqrt(q.shape[-1])
    return towards_q.view(q.shape), _like(towards_k, k), _like(towards_v, v)


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    towards: tuple[Tensor, Tensor, Tensor] = _backward(grad, *ctx.saved_tensors)
    return towards


_forward.register_autograd(_differentiate, setup_context=_keep)


def _block_size(n_tokens: int) -> int:
    """Queries of a block."""
    return 128 if n_tokens <= 512 else 256


def _sums(x: Tensor, once: bool) -> Tensor:
    """Where to add up what [n, T, K] gets from each block: in float32, unless there is one only."""
    return torch.empty_like(x) if once else torch.zeros_like(x, dtype=torch.float32)


def _add(sums: Tensor, a: Tensor, b: Tensor, once: bool) -> None:
    """Add a b to `sums`, or put it there."""
    if once:
        torch.bmm(a, b, out=sums)
    else:
        sums += a @ b


def _blocks(n_groups: int, per_group: int, n_tokens: int) -> Iterator[tuple[slice, int, int]]:
    """Which key/value heads of all samples, and which queries of theirs, to take together."""
    size = _block_size(n_tokens)
    for begin in range(0, n_tokens, size):
        end = min(begin + size, n_tokens)
        step = max(1, SCORE_BYTES // (2 * per_group * (end - begin) * end))
        for first in range(0, n_groups, step):
            yield slice(first, first + step), begin, end


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    """softmax of the causal scores: [n, R, Q, K] scaled, [n, E, K] -> [n, R Q, E]."""
    scores = queries.flatten(1, 2) @ keys.transpose(1, 2)
    n_queries, n_keys = queries.shape[2], keys.shape[1]
    later = scores.new_full((n_queries, n_queries), -math.inf).triu_(1)
    scores.unflatten(1, (-1, n_queries))[..., n_keys - n_queries :] += later
    return scores.softmax(dim=-1)


def _scaled(q: Tensor, n_groups: int) -> Tensor:
    """[B, H, T, K] -> [B G, R, T, K] / sqrt(K)."""
    scaled = q.new_empty(q.shape)
    torch.mul(q, 1 / math.sqrt(q.shape[-1]), out=scaled)
    return scaled.view(n_groups, -1, *q.shape[2:])


def _heads(x: Tensor) -> Tensor:
    """[B, G, T, K] -> [B G, T, K]."""
    return x.reshape(-1, *x.shape[2:])


def _like(sums: Tensor, x: Tensor) -> Tensor:
    return sums.to(x.dtype).view(x.shape)
