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
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgpt.model.context import BatchContext, ForwardContext
from fgpt.model.dropout import Dropout, threshold
from fgpt.model.kernels.blocked_attention import blocked_attention
from fgpt.model.mask import AttentionMask

MAX_D_HEAD = 256
MIN_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports_dropout_attention(q: Tensor) -> bool:
    """Whether `dropout_attention` runs with q [.., K] on its device; tried once for each dtype."""
    if not q.is_cuda or q.dtype not in DTYPES or q.shape[-1] > MAX_D_HEAD:
        return False
    return _works_on(q.device, q.dtype)


@cache
def _works_on(device: torch.device, dtype: torch.dtype) -> bool:
    """Compare a small call with `blocked_attention`; warn if this GPU or its compiler fails."""
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return False
    context = ForwardContext()
    context.current = BatchContext(seed=1, step=0, first_sample=0)
    dropout = Dropout(0.2, 0, context)
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(1, n, 70, 32, generator=generator) for n in (2, 1, 1, 2)]
    q, k, v, grad = (part.to(device, dtype) for part in parts)
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
            f"attention with dropout takes a slower path: the Triton kernel fails on {device}:"
            f" {type(error).__name__}: {first}",
            stacklevel=2,
        )
        return False
    return True


def dropout_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, dropout: Dropout
) -> Tensor:
    """q [B, H, T, K], k and v [B, G, T, K] on a GPU, K at most MAX_D_HEAD -> [B, H, T, K]."""
    begins = mask.document_begins
    if begins is not None:
        begins = begins.to(q.device, torch.int32).contiguous()  # (B, T)
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
    _forward_tile[grid](q, k, v, hashes, begins, y, log_sums, *q.shape[1:3], **options)
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
    _grad_q_tile[q.shape[0] * q.shape[1], n_tiles](*common, grad_q, *sizes, **options)
    _grad_kv_tile[k.shape[0] * k.shape[1], n_tiles](
        *common, ends, grad_k, grad_v, *sizes, **options
    )
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


# The kernels below run one tile of queries, or of keys, of one head per program. Their common
# arguments: q, k, v, hashes [B, H, T], begins [B, T] of the queries' documents, H, T, `_options`.


@triton.jit
def _forward_tile(
    q, k, v, hashes, begins, y, log_sums, H, T, threshold, kept_factor, scale, window,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    # 1. this tile's queries, and the first key that any of them sees
    head, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    queries = begin + tl.arange(0, M)
    group, sample = head // R, head // H
    q_tile = _load(q + head * T * K, queries, T, K, D)
    row_hashes = tl.load(hashes + head * T + queries, mask=queries < T, other=0)
    document = _documents(begins, sample * T, queries, T, HAS_DOCUMENTS)
    first = _first_key(begins, sample * T, begin, window, M, HAS_WINDOW, HAS_DOCUMENTS)
    # 2. softmax of its scores, a tile of keys at a time (Milakov and Gimelshein 2018)
    largest = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, D], tl.float32)
    for start in range(first, tl.minimum(begin + M, T), M):
        keys = start + tl.arange(0, M)
        k_tile = _load(k + group * T * K, keys, T, K, D)
        v_tile = _load(v + group * T * K, keys, T, K, D)
        scores = _scores(
            q_tile, k_tile, queries, keys, document, scale, window, HAS_WINDOW, HAS_DOCUMENTS
        )
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # a row of which all keys so far are hidden
        base = tl.where(new_largest == -float("inf"), 0.0, new_largest)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(largest - base)
        total = total * shrink + tl.sum(weights, 1)
        kept = weights * _keep(row_hashes, keys, threshold, kept_factor)
        mixed = mixed * shrink[:, None] + tl.dot(
            kept.to(v_tile.dtype), v_tile, input_precision="ieee"
        )
        largest = new_largest
    # 3. its output
    # (B, T, H, K)
    y_head = y + (sample * T * H + head % H) * K
    _store(y_head, queries, mixed / total[:, None], T, K, D, H * K)
    tl.store(log_sums + head * T + queries, largest + tl.log(total), mask=queries < T)


@triton.jit
def _grad_q_tile(
    q, k, v, hashes, begins, grad, log_sums, products, grad_q, H, T,
    threshold, kept_factor, scale, window,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    head, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    queries = begin + tl.arange(0, M)
    group, sample = head // R, head // H
    inside = queries < T
    q_tile = _load(q + head * T * K, queries, T, K, D)
    grad_tile = _load(grad + head * T * K, queries, T, K, D)
    row_hashes = tl.load(hashes + head * T + queries, mask=inside, other=0)
    row_sums = tl.load(log_sums + head * T + queries, mask=inside, other=0.0)
    row_products = tl.load(products + head * T + queries, mask=inside, other=0.0)
    document = _documents(begins, sample * T, queries, T, HAS_DOCUMENTS)
    first = _first_key(begins, sample * T, begin, window, M, HAS_WINDOW, HAS_DOCUMENTS)
    result = tl.zeros([M, D], tl.float32)
    for start in range(first, tl.minimum(begin + M, T), M):
        keys = start + tl.arange(0, M)
        k_tile = _load(k + group * T * K, keys, T, K, D)
        v_tile = _load(v + group * T * K, keys, T, K, D)
        scores = _scores(
            q_tile, k_tile, queries, keys, document, scale, window, HAS_WINDOW, HAS_DOCUMENTS
        )
        weights = tl.exp(scores - row_sums[:, None])
        grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        grad_weights *= _keep(row_hashes, keys, threshold, kept_factor)
        grad_scores = weights * (grad_weights - row_products[:, None])
        result += tl.dot(grad_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
    _store(grad_q + head * T * K, queries, result * scale, T, K, D, K)


@triton.jit
def _grad_kv_tile(
    q, k, v, hashes, begins, grad, log_sums, products, ends, grad_k, grad_v, H, T,
    threshold, kept_factor, scale, window,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    # 1. this tile's keys, and the last query that sees any of them
    group, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    keys = begin + tl.arange(0, M)
    sample = group * R // H
    k_tile = _load(k + group * T * K, keys, T, K, D)
    v_tile = _load(v + group * T * K, keys, T, K, D)
    end = T
    if HAS_WINDOW:
        end = tl.minimum(end, begin + M + window - 1)
    if HAS_DOCUMENTS:
        end = tl.minimum(end, tl.load(ends + sample * tl.num_programs(1) + tl.program_id(1)))
    # 2. the gradients of all queries of all heads of the group
    sum_k, sum_v = tl.zeros([M, D], tl.float32), tl.zeros([M, D], tl.float32)
    for number in range(R):
        head = group * R + number
        for start in range(begin, end, M):
            queries = start + tl.arange(0, M)
            inside = queries < T
            q_tile = _load(q + head * T * K, queries, T, K, D)
            grad_tile = _load(grad + head * T * K, queries, T, K, D)
            row_hashes = tl.load(hashes + head * T + queries, mask=inside, other=0)
            row_sums = tl.load(log_sums + head * T + queries, mask=inside, other=0.0)
            row_products = tl.load(products + head * T + queries, mask=inside, other=0.0)
            document = _documents(begins, sample * T, queries, T, HAS_DOCUMENTS)
            scores = _scores(
                q_tile, k_tile, queries, keys, document, scale, window, HAS_WINDOW, HAS_DOCUMENTS
            )
            weights = tl.exp(scores - row_sums[:, None])
            keep = _keep(row_hashes, keys, threshold, kept_factor)
            sum_v += tl.dot(
                tl.trans((weights * keep).to(grad_tile.dtype)), grad_tile, input_precision="ieee"
            )
            grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee") * keep
            grad_scores = weights * (grad_weights - row_products[:, None])
            sum_k += tl.dot(tl.trans(grad_scores.to(q_tile.dtype)), q_tile, input_precision="ieee")
    _store(grad_k + group * T * K, keys, sum_k * scale, T, K, D, K)
    _store(grad_v + group * T * K, keys, sum_v, T, K, D, K)


@triton.jit
def _documents(begins, row, queries, T, HAS_DOCUMENTS: tl.constexpr):
    """Where each query's document begins; `row`: the sample's first element in `begins`."""
    if HAS_DOCUMENTS:
        return tl.load(begins + row + queries, mask=queries < T, other=0)
    return queries * 0


@triton.jit
def _first_key(
    begins,
    row,
    begin,
    window,
    M: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """The first key that the queries from `begin` on see, rounded down to a multiple of M."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(first, begin - window + 1)
    if HAS_DOCUMENTS:
        first = tl.maximum(first, tl.load(begins + row + begin))
    return first // M * M


@triton.jit
def _scores(
    q_tile, k_tile, queries, keys, document, scale, window,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """[M, N], -inf where hidden."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    visible = keys[None, :] <= queries[:, None]
    if HAS_WINDOW:
        visible = visible & (keys[None, :] > queries[:, None] - window)
    if HAS_DOCUMENTS:
        visible = visible & (keys[None, :] >= document[:, None])
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def _keep(row_hashes, keys, threshold, kept_factor):
    """The factor of each weight [M, N]: `fgpt.model.dropout.mix_in` and `is_kept`."""
    x = row_hashes[:, None] + keys[None, :] * -1640531527
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -2073254261
    x = x ^ ((x >> 16) & 0xFFFF)
    return tl.where(x >= threshold, kept_factor, 0.0)


@triton.jit
def _load(base, rows, T, K: tl.constexpr, D: tl.constexpr):
    """Rows of [T, K], with zeros beyond: [N, D]."""
    columns = tl.arange(0, D)
    inside = (rows[:, None] < T) & (columns[None, :] < K)
    return tl.load(base + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, values, T, K: tl.constexpr, D: tl.constexpr, row_stride):
    columns = tl.arange(0, D)
    inside = (rows[:, None] < T) & (columns[None, :] < K)
    places = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :]
    tl.store(places, values.to(base.dtype.element_ty), mask=inside)
