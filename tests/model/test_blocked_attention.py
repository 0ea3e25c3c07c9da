"""Attention by matrix products over blocks: against the written-out form, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fgpt.model import attention
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.kernels import blocked_attention as blocked_module
from fgpt.model.kernels import document_attention
from fgpt.model.kernels.blocked_attention import blocked_attention
from fgpt.model.mask import CAUSAL, AttentionMask

HEADS = [(4, 4), (4, 2), (6, 1)]


def inputs(n_head, n_kv_head, tokens, width=16, dtype=torch.float32, batch=2):
    """q, k, v as a projection leaves them: slices of one tensor, tokens before heads."""
    generator = torch.Generator().manual_seed(tokens)
    size = (batch, tokens, n_head + 2 * n_kv_head, width)
    qkv = torch.randn(size, generator=generator).to(dtype).transpose(1, 2)
    towards = torch.randn(batch, n_head, tokens, width, generator=generator).to(dtype)
    return qkv.split((n_head, n_kv_head, n_kv_head), dim=1), towards


def results(kernel, parts, towards):
    """The output and the gradients."""
    parts = [part.detach().requires_grad_() for part in parts]
    y = kernel(*parts, CAUSAL)
    return [y.detach(), *torch.autograd.grad(y, parts, towards.to(y.dtype))]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 127, 128, 129, 300, 513, 700])
def test_float32_agrees_with_the_reference(tokens, heads):
    parts, towards = inputs(*heads, tokens)
    slow, fast = (results(f, parts, towards) for f in (reference_attention, blocked_attention))
    for wanted, got in zip(slow, fast, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("score_bytes", [1, 100_000])
def test_few_heads_at_a_time_give_the_same(score_bytes, monkeypatch):
    parts, towards = inputs(4, 2, 260)
    at_once = results(blocked_attention, parts, towards)
    monkeypatch.setattr(blocked_module, "SCORE_BYTES", score_bytes)
    for wanted, got in zip(at_once, results(blocked_attention, parts, towards), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("tokens", [128, 257, 600])
def test_bf16_is_as_near_to_float64_as_the_reference(tokens, heads):
    """Its softmax' gradient is taken of rounded weights, and each block's part of k's is rounded:
    a fifth more at most, and like torch's own kernel for k and v.
    """
    parts, towards = inputs(*heads, tokens, width=64, dtype=torch.bfloat16)
    exact = results(reference_attention, [part.double() for part in parts], towards)
    slow, fast = (results(f, parts, towards) for f in (reference_attention, blocked_attention))
    for true, wanted, got in zip(exact, slow, fast, strict=True):
        own, its = ((x.double() - true).norm() / true.norm() for x in (got, wanted))
        assert own <= 1.2 * its
        assert own < 2**-7


def test_only_inputs_are_kept():
    (q, k, v), _ = inputs(4, 4, 256, dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        blocked_attention(q.detach().requires_grad_(), k, v, CAUSAL)
    assert kept == [q.numel(), k.numel(), v.numel()]


def test_it_is_chosen_for_bf16_alone(monkeypatch):
    calls = []
    for module in (attention, document_attention):
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
    got = sdpa_attention(q, k, v, documents)
    dense = documents.dense(300, 300, q.device)
    wanted = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=dense, enable_gqa=True
    )
    assert (got.double() - wanted).norm() < 2**-7 * wanted.norm()


def test_the_operators_are_sound():
    parts, _ = inputs(4, 2, 130, width=4, dtype=torch.float64, batch=1)
    parts = [part.detach().requires_grad_() for part in parts]
    torch.library.opcheck(blocked_module._forward, parts)
