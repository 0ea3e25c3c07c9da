"""Attention within documents: kernels against each other, packed documents against each alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fgpt.config.presets import PRESETS
from fgpt.model.attention import reference_attention, sdpa_attention
from fgpt.model.context import BatchContext, ForwardContext
from fgpt.model.dropout import Dropout
from fgpt.model.gpt import GPT
from fgpt.model.init import initialize
from fgpt.model.kernels import masked_attention
from fgpt.model.kernels.masked_attention import (
    dense_mask_attention,
    pack_rows,
    supports_varlen_flash,
    varlen_flash,
)
from fgpt.model.mask import AttentionMask

TINY = replace(PRESETS["tiny"], vocab_size=96, n_layer=2, d_model=64, max_seq_len=32)


def documents(rows: list[list[int]]) -> AttentionMask:
    """The mask of rows of documents of these lengths."""
    begins = []
    for lengths in rows:
        ends = torch.tensor(lengths).cumsum(0)
        begins.append(torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths)))
    return AttentionMask(torch.stack(begins))


def slow_attention(q: Tensor, k: Tensor, v: Tensor, rows: list[list[int]]) -> Tensor:
    """Query by query, over the earlier tokens of the same document."""
    out = torch.zeros_like(q)
    for b, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            for i in range(begin, begin + length):
                for h in range(q.shape[1]):
                    g = h * k.shape[1] // q.shape[1]
                    scores = k[b, g, begin : i + 1] @ q[b, h, i] / q.shape[-1] ** 0.5
                    out[b, h, i] = scores.softmax(0) @ v[b, g, begin : i + 1]
            begin += length
    return out


def slow_varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, window_size):
    """Slow stand-in for torch's varlen_attn: [tokens, heads, K] each, equal numbers of heads."""
    assert q.shape == k.shape == v.shape and q.dim() == 3
    assert cu_q.dtype == torch.int32 and cu_q is cu_k and window_size == (-1, 0)
    assert max_q == max_k == max((cu_q[1:] - cu_q[:-1]).tolist())
    assert cu_q[0] == 0 and cu_q[-1] == len(q)
    out = torch.empty_like(q)
    for a, b in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        scores = torch.einsum("qhk,shk->hqs", q[a:b], k[a:b]) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~torch.ones(b - a, b - a).tril().bool(), -torch.inf)
        out[a:b] = torch.einsum("hqs,shk->qhk", scores.softmax(-1), v[a:b])
    return out


ROWS = [
    [[3, 5, 1, 7], [16]],
    [[1] * 16, [15, 1]],
    [[4, 12], [8, 8]],
]


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kernel", ["reference", "sdpa", "dense", "flash"])
def test_kernels_agree(kernel, groups, rows, monkeypatch):
    monkeypatch.setattr(masked_attention, "varlen_attn", slow_varlen_attn)
    kernels = {
        "reference": reference_attention,
        "sdpa": sdpa_attention,
        "dense": dense_mask_attention,
        "flash": lambda *inputs: pack_rows(varlen_flash, *inputs),
    }
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 16, 8) for heads in (4, groups, groups)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    q, k, v = (x.requires_grad_() for x in tensors)
    expected = slow_attention(q, k, v, rows)
    grad_y = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    slow_grads = torch.autograd.grad(expected, (q, k, v), grad_y)
    actual = kernels[kernel](q, k, v, documents(rows))
    grads = torch.autograd.grad(actual, (q, k, v), grad_y)
    close = {"rtol": 1e-5, "atol": 1e-6}  # the reference's softmax is in float32
    torch.testing.assert_close(actual, expected, **close)
    torch.testing.assert_close(grads, slow_grads, **close)


def test_flash_attention_reads_keys_and_values_where_they_are(monkeypatch):
    """With as many key/value as query heads there is nothing to repeat."""
    q, k, v = torch.randn(3, 16, 4, 8).unbind()
    seen = []
    monkeypatch.setattr(masked_attention, "varlen_attn", lambda *args, **_: seen.append(args) or q)
    varlen_flash(q, k, v, documents([[3, 5], [8]]))
    assert seen[0][1] is k and seen[0][2] is v


def test_varlen_flash_is_for_gpus():
    meta = torch.empty(4, 4, 64, dtype=torch.bfloat16)
    assert not supports_varlen_flash(meta)


def test_dropout_sees_no_other_document():
    docs = documents([[3, 5], [8]])
    q, k, v = torch.randn(3, 2, 4, 8, 16).unbind()
    other = torch.cat((torch.randn(2, 4, 3, 16), v[:, :, 3:]), dim=2)  # of the first three tokens
    context = ForwardContext()
    context.current = BatchContext(mask=docs)
    dropout = Dropout(0.2, site=1, context=context)
    for kernel in (reference_attention, sdpa_attention):
        before, after = (kernel(q, k, values, docs, dropout) for values in (v, other))
        assert torch.equal(before[0, :, 3:], after[0, :, 3:])  # the second document
        assert not torch.allclose(before[1, :, 3:], after[1, :, 3:])  # of the same document


def one_row(model: GPT, ids: Tensor, lengths: list[int], *, reset: bool) -> Tensor:
    docs = documents([lengths])
    positions = torch.arange(ids.shape[1]) - docs.document_begins
    with model.context.activate(BatchContext(mask=docs, positions=positions if reset else None)):
        return model(ids)


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary", "none"])
def test_packed_documents_match_each_document_alone(position, attention):
    config = replace(TINY, position=position, attention=attention, n_kv_head=2)
    model = GPT(config)
    initialize(model, config, 0)
    ids = torch.randint(0, 96, (1, 30), generator=torch.Generator().manual_seed(0))
    lengths = [11, 1, 18]
    together = one_row(model, ids, lengths, reset=True)
    alone = torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids)[:, 12:], alone[:, 12:], atol=1e-3)  # without a mask
    unreset = one_row(model, ids, lengths, reset=False)
    resets = position in ("learned", "sinusoidal")  # rotary positions are relative
    assert torch.allclose(unreset, alone, atol=1e-5) != resets


def test_recomputation_uses_the_mask_of_its_forward_pass():
    config = replace(TINY, position="rotary")
    ids = torch.randint(0, 96, (1, 30), generator=torch.Generator().manual_seed(0))

    def gradients(recompute: bool) -> list[Tensor]:
        model = GPT(config)
        initialize(model, config, 0)
        if recompute:
            model.checkpoint_activations(lambda run, x: checkpoint(run, x, use_reentrant=False), 2)
        losses = [
            one_row(model, ids, lengths, reset=True).sin().mean() for lengths in ([11, 19], [30])
        ]
        sum(losses).backward()  # after both
        return [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_the_context_is_reset_after_a_forward_pass():
    model = GPT(TINY)
    initialize(model, TINY, 0)
    ids = torch.randint(0, 96, (1, 30))
    one_row(model, ids, [11, 19], reset=True)
    assert model.context.current == BatchContext()
