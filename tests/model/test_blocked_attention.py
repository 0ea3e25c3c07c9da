"""Blocked attention against the reference, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fgpt.model import attention
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.context import BatchContext, ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.kernels import blocked_attention as blocked_module
from fgpt.model.kernels import masked_attention
from fgpt.model.kernels.blocked_attention import blocked_attention
from fgpt.model.mask import CAUSAL, AttentionMask

HEADS = [(4, 4), (4, 2), (6, 1)]


def inputs(n_head, n_kv_head, tokens, width=16, dtype=torch.float32, batch=2):
    """q, k, v with a projection's memory layout: slices of one tensor, tokens before heads."""
    generator = torch.Generator().manual_seed(tokens)
    size = (batch, tokens, n_head + 2 * n_kv_head, width)
    qkv = torch.randn(size, generator=generator).to(dtype).transpose(1, 2)
    grad_y = torch.randn(batch, n_head, tokens, width, generator=generator).to(dtype)
    return qkv.split((n_head, n_kv_head, n_kv_head), dim=1), grad_y


def results(kernel, parts, grad_y):
    """The output and the gradients."""
    parts = [part.detach().requires_grad_() for part in parts]
    y = kernel(*parts, CAUSAL)
    return [y.detach(), *torch.autograd.grad(y, parts, grad_y.to(y.dtype))]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 300, 513, 700])
def test_float32_agrees_with_the_reference(tokens, heads):
    parts, grad_y = inputs(*heads, tokens)
    slow, fast = (results(f, parts, grad_y) for f in (reference_attention, blocked_attention))
    for expected, actual in zip(slow, fast, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("score_bytes", [1, 100_000])
def test_block_sizes_give_the_same(score_bytes, monkeypatch):
    parts, grad_y = inputs(4, 2, 260)
    at_once = results(blocked_attention, parts, grad_y)
    monkeypatch.setattr(blocked_module, "SCORE_BYTES", score_bytes)
    for expected, actual in zip(at_once, results(blocked_attention, parts, grad_y), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", [128, 257, 600])
def test_bf16_error_is_close_to_the_references(tokens, heads):
    """At most 1.2 times: the softmax gradient uses rounded weights, and each block's term of k's
    gradient is rounded.
    """
    parts, grad_y = inputs(*heads, tokens, width=64, dtype=torch.bfloat16)
    exact = results(reference_attention, [part.double() for part in parts], grad_y)
    slow, fast = (results(f, parts, grad_y) for f in (reference_attention, blocked_attention))
    for exact_value, expected, actual in zip(exact, slow, fast, strict=True):
        error, reference_error = (
            (x.double() - exact_value).norm() / exact_value.norm() for x in (actual, expected)
        )
        assert error <= 1.2 * reference_error
        assert error < 2**-7


def test_only_inputs_are_saved():
    (q, k, v), _ = inputs(4, 4, 256, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        blocked_attention(q.detach().requires_grad_(), k, v, CAUSAL)
    assert kept == [q.numel(), k.numel(), v.numel()]


def test_it_is_chosen_for_bf16_only(monkeypatch):
    calls = []
    for module in (attention, masked_attention):
        monkeypatch.setattr(
            module,
            "blocked_attention",
            lambda q, *_: calls.append(q.shape[2]) or torch.zeros_like(q),
        )
    monkeypatch.setattr(blocked_module, "multiplies_bf16", lambda: True)
    begins = torch.cat((torch.zeros(200), torch.full((100,), 200))).long()[None]
    documents = AttentionMask(begins)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        (q, k, v), _ = inputs(4, 2, 300, dtype=dtype, batch=1)
        sdpa_attention(q, k, v, CAUSAL)
        sdpa_attention(q, k, v, documents)  # the document of 100 is too short
        sdpa_attention(q[:, :, -1:], k, v, CAUSAL)  # decoding
        assert calls == ([300, 200] if dtype == torch.bfloat16 else [])
    monkeypatch.setattr(blocked_module, "multiplies_bf16", lambda: False)
    sdpa_attention(q, k, v, CAUSAL)
    assert calls == [300, 200]


def test_documents_of_any_length_agree_with_each_alone(monkeypatch):
    monkeypatch.setattr(blocked_module, "multiplies_bf16", lambda: True)
    begins = torch.cat((torch.zeros(200), torch.full((100,), 200))).long()[None]
    documents = AttentionMask(begins)
    (q, k, v), _ = inputs(4, 2, 300, dtype=torch.bfloat16, batch=1)
    actual = sdpa_attention(q, k, v, documents)
    dense = documents.dense(300, 300, q.device)
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=dense, enable_gqa=True
    )
    assert (actual.double() - expected).norm() < 2**-7 * expected.norm()


def dropout(p=0.3):
    """Of samples 5 and 6, heads 4 to 7 of a model."""
    context = ForwardContext()
    context.current = BatchContext(1, 3, 5)
    made = Dropout(p, site=2, context=context)
    made.shard_index = 1
    return made


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("tokens", [3, 128, 300])
def test_dropout_draws_the_references_mask(tokens, with_documents, window):
    parts, grad_y = inputs(4, 2, tokens)
    begins = None
    if with_documents:
        column = torch.arange(tokens)
        begins = torch.stack((column // 100 * 100, (column >= 2).long() * 2))
    mask, drop = AttentionMask(begins, window), dropout()
    found = []
    for kernel in (reference_attention, sdpa_attention):
        leaves = [part.detach().requires_grad_() for part in parts]
        y = kernel(*leaves, mask, drop)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad_y)])
    for expected, actual in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5)
    # and it does drop
    undropped = reference_attention(*parts, mask)
    assert (undropped - found[0][0]).norm() > 0.1 * undropped.norm()


def test_dropout_in_bf16_and_small_blocks(monkeypatch):
    monkeypatch.setattr(blocked_module, "SCORE_BYTES", 1)
    parts, _ = inputs(6, 2, 260, width=32, dtype=torch.bfloat16)
    exact = reference_attention(*(part.double() for part in parts), CAUSAL, dropout())
    slow, fast = (f(*parts, CAUSAL, dropout()) for f in (reference_attention, sdpa_attention))
    errors = [(y.double() - exact).norm() / exact.norm() for y in (slow, fast)]
    assert errors[1] <= 1.2 * errors[0] < 2**-6


def test_dropout_saves_no_scores():
    (q, k, v), _ = inputs(4, 4, 256)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        sdpa_attention(q.detach().requires_grad_(), k, v, CAUSAL, dropout())
    assert sorted(kept) == sorted([q.numel(), k.numel(), v.numel(), 2 * 4 * 256])


def test_the_operator_passes_opcheck():
    parts, _ = inputs(4, 2, 130, width=4, dtype=torch.float64, batch=1)
    parts = [part.detach().requires_grad_() for part in parts]
    torch.library.opcheck(blocked_module._forward, parts)
    # one sample: flattening a transposed view keeps its strides, which no output may have
    views = [x.transpose(1, 2).contiguous().transpose(1, 2).detach() for x in parts]
    torch.library.opcheck(blocked_module._forward, views)
    torch.library.opcheck(blocked_module._backward, [torch.ones_like(views[0]), *views])
    hashes = dropout().hashes((1, 4, 130), torch.device("cpu"))
    begins = (torch.arange(130) // 40 * 40)[None]
    torch.library.opcheck(blocked_module._forward, [*parts, 60, hashes, 0.3, begins])
