"""Causal attention with dropout on a GPU, in Triton: no [T, T] tensor, forward or backward.

FlashAttention-2's loops (Dao 2023, algorithms 1 and 2), where each tile draws its own part of the
dropout mask: a hash of each weight's place (`fgpt.model.dropout`), the reference's mask. Sliding
windows and documents skip the tiles that they hide. The slow twins are `blocked_attention` and
`reference_attention`.

B batch, T tokens, K d_head, H query heads, G key/value heads, R = H / G. Per tile: M queries, N
keys; D = K rounded up to a power of 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from fgpt.model.context import BatchContext, ForwardContext
from fgpt.model.dropout import Dropout, threshold
from fgpt.model.kernels.blocked_attention import blocked_attention
from fgpt.model.kernels.dropout_attention_tiles import (
    forward_tile,
    grad_kv_tile,
    grad_q_tile,
)
from fgpt.model.mask import AttentionMask

MAX_D_HEAD = 256
MIN_CAPABILITY = (8, 0)


def works_here(dtype: torch.dtype) -> bool:
    """Whether the kernel gives `blocked_attention`'s values and gradients on this process's GPU.

    Call it before training: a first call within recomputed activations would be recorded with them.
    Warns if the GPU or its compiler fails.
    """
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return False
    context = ForwardContext()
    context.current = BatchContext(seed=1, step=0, first_sample=0)
    dropout = Dropout(0.2, 0, context)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1, n, 70, 32, generator=generator) for n in (2, 1, 1, 2)]
    q, k, v, grad = (part.to("cuda", dtype) for part in parts)
    results = []
    kernels: tuple[Callable[..., Tensor], ...] = (dropout_attention, blocked_attention)
    try:
        for kernel in kernels:
            leaves = [part.detach().requires_grad_() for part in (q, k, v)]
            y = kernel(*leaves, AttentionMask(), dropout)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    except Exception as error:  # Triton's and its compilers' are of any kind
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(
            "attention with dropout takes a slower path: the Triton kernel fails on this GPU:"
            f" {type(error).__name__}: {first}",
            stacklevel=2,
        )
        return False
    return True


def dropout_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: Dropout
) -> Tensor:
    """q [B, H, T, K], k and v [B, G, T, K] on a GPU, K at most MAX_D_HEAD -> [B, H, T, K]."""
    begins = None if mask.document_begins is None else mask.begins(q.device)  # (B, T)
    hashes = dropout.hashes(q.shape[:3], q.device)  # (B, H, T)
    window = mask.window if mask.window_hides(q.shape[2]) else None
    parts = (x.contiguous() for x in (q, k, v))
    y: Tensor = _forward(*parts, window, hashes, dropout.p, begins)[0]
    return y


# Operators, as those of `blocked_attention`; their first arguments are its.
@torch.library.custom_op("fgpt::dropout_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    hashes: Tensor,
    p: float,
    begins: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """-> output [B, H, T, K]; log of the sum of the exponentials of each query's scores [B, H, T],
    float32.
    """
    y, log_sums = _outputs(q)
    tile, options = _options(q, k, p, window, begins)
    grid = (q.shape[0] * q.shape[1], triton.cdiv(q.shape[2], tile))
    forward_tile[grid](q, k, v, hashes, begins, y, log_sums, *q.shape[1:3], **options)
    return y, log_sums


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, T, K] is a view of [B, T, H, K]: the projection after it then saves no copy."""
    batch, heads, tokens, d_head = q.shape
    y = q.new_empty(batch, tokens, heads, d_head).transpose(1, 2)
    return y, q.new_empty(q.shape[:3], dtype=torch.float32)


@_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("fgpt::dropout_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    hashes: Tensor,
    p: float,
    begins: Tensor | None,
    y: Tensor,
    log_sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    # 1. for each query the sum over keys of weight x its gradient, which is that of grad x y
    grad = grad.contiguous()
    products = (grad.float() * y.float()).sum(-1).contiguous()  # (B, H, T)
    # 2. for each tile of keys the end of the queries that its last key's document has
    tile, options = _options(q, k, p, window, begins)
    n_tiles = triton.cdiv(q.shape[2], tile)
    ends = None
    if begins is not None:
        last_keys = torch.arange(1, n_tiles + 1, device=q.device, dtype=torch.int32) * tile - 1
        last_keys = last_keys.expand(len(begins), n_tiles).contiguous()
        ends = torch.searchsorted(begins, last_keys, right=True, out_int32=True)
    # 3. the gradients
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    common = (q, k, v, hashes, begins, grad, log_sums, products)
    sizes = q.shape[1:3]
    grad_q_tile[q.shape[0] * q.shape[1], n_tiles](*common, grad_q, *sizes, **options)
    grad_kv_tile[k.shape[0] * k.shape[1], n_tiles](*common, ends, grad_k, grad_v, *sizes, **options)
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window, hashes, ctx.p, begins = inputs
    ctx.save_for_backward(q, k, v, hashes, begins, *output)


def _backward_from_saved(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, hashes, begins, y, log_sums = ctx.saved_tensors
    gradients: tuple[Tensor, Tensor, Tensor] = _backward(
        grad, q, k, v, ctx.window, hashes, ctx.p, begins, y, log_sums
    )
    return *gradients, None, None, None, None


_forward.register_autograd(_backward_from_saved, setup_context=_save)


def _options(
    q: Tensor, k: Tensor, p: float, window: int | None, begins: Tensor | None
) -> tuple[int, dict[str, Any]]:
    """M, and the kernels' last arguments. A tile of q has at most 16 KiB: so a kernel fits into the
    99 KiB of shared memory of small GPUs.
    """
    d_head = q.shape[3]
    wide = max(16, triton.next_power_of_2(d_head))
    tile = max(16, min(64, 2**14 // (wide * q.element_size())))
    options = {
        "threshold": threshold(p),
        "kept_factor": 1 / (1 - p),
        "scale": 1 / math.sqrt(d_head),
        "window": window or 0,
        "R": q.shape[1] // k.shape[1],
        "K": d_head,
        "D": wide,
        "M": tile,
        "HAS_WINDOW": window is not None,
        "HAS_DOCUMENTS": begins is not None,
        "num_stages": 1,
    }
    return tile, options
