"""The tiles of `fgpt.model.kernels.dropout_attention`, in Triton: one program computes one tile of
queries, or of keys, of one head.

Common arguments: q [B, H, T, K], k and v [B, G, T, K], hashes [B, H, T] of the queries' places,
begins [B, T] of their documents, H, T, and what `_options` of that file says.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_tile(
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
def grad_q_tile(
    q, k, v, hashes, begins, grad, log_sums, products, grad_q, H, T,
    threshold, kept_factor, scale, window,
    R: tl.constexpr, K: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    head, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * M
    queries = begin + tl.arange(0, M)
    group, sample = head // R, head // H
    q_tile = _load(q + head * T * K, queries, T, K, D)
    grad_tile = _load(grad + head * T * K, queries, T, K, D)
    first = _first_key(begins, sample * T, begin, window, M, HAS_WINDOW, HAS_DOCUMENTS)
    result = tl.zeros([M, D], tl.float32)
    for start in range(first, tl.minimum(begin + M, T), M):
        keys = start + tl.arange(0, M)
        k_tile = _load(k + group * T * K, keys, T, K, D)
        v_tile = _load(v + group * T * K, keys, T, K, D)
        _, grad_scores = _weights_and_grads(
            q_tile, k_tile, v_tile, grad_tile, hashes, begins, log_sums, products, queries, keys,
            head * T, sample * T, T, threshold, kept_factor, scale, window,
            HAS_WINDOW, HAS_DOCUMENTS,
        )  # fmt: skip
        result += tl.dot(grad_scores.to(k_tile.dtype), k_tile, input_precision="ieee")
    _store(grad_q + head * T * K, queries, result * scale, T, K, D, K)


@triton.jit
def grad_kv_tile(
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
            q_tile = _load(q + head * T * K, queries, T, K, D)
            grad_tile = _load(grad + head * T * K, queries, T, K, D)
            kept, grad_scores = _weights_and_grads(
                q_tile, k_tile, v_tile, grad_tile, hashes, begins, log_sums, products,
                queries, keys, head * T, sample * T, T, threshold, kept_factor, scale, window,
                HAS_WINDOW, HAS_DOCUMENTS,
            )  # fmt: skip
            sum_v += tl.dot(tl.trans(kept.to(grad_tile.dtype)), grad_tile, input_precision="ieee")
            sum_k += tl.dot(tl.trans(grad_scores.to(q_tile.dtype)), q_tile, input_precision="ieee")
    _store(grad_k + group * T * K, keys, sum_k * scale, T, K, D, K)
    _store(grad_v + group * T * K, keys, sum_v, T, K, D, K)


@triton.jit
def _weights_and_grads(
    q_tile, k_tile, v_tile, grad_tile, hashes, begins, log_sums, products, queries, keys,
    head_row, sample_row, T, threshold, kept_factor, scale, window,
    HAS_WINDOW: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The weights after dropout and the gradients of the scores, both [M, N], float32; `head_row`,
    `sample_row`: the first element of the head and of the sample in [B, H, T] and [B, T].
    """
    inside = queries < T
    row_hashes = tl.load(hashes + head_row + queries, mask=inside, other=0)
    row_sums = tl.load(log_sums + head_row + queries, mask=inside, other=0.0)
    row_products = tl.load(products + head_row + queries, mask=inside, other=0.0)
    document = _documents(begins, sample_row, queries, T, HAS_DOCUMENTS)
    scores = _scores(
        q_tile, k_tile, queries, keys, document, scale, window, HAS_WINDOW, HAS_DOCUMENTS
    )
    weights = tl.exp(scores - row_sums[:, None])
    keep = _keep(row_hashes, keys, threshold, kept_factor)
    grad_weights = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee") * keep
    return weights * keep, weights * (grad_weights - row_products[:, None])


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
