"""Fused head and loss against the unfused pair: values, gradients, and saved tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fgpt.config.presets import PRESETS
from fgpt.model.gpt import GPT, next_token_loss
from fgpt.model.init import initialize
from fgpt.model.kernels import fused_head_loss as kernel
from fgpt.model.kernels.fused_head_loss import chunk_size, fused_head_loss

TINY = replace(PRESETS["tiny"], vocab_size=97, n_layer=2, d_model=64, max_seq_len=32)


def inputs(tokens=45, vocab=97, width=16, dtype=torch.float32, spread=1.0):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, width, generator=generator).to(dtype).requires_grad_()
    weight = (spread * torch.randn(vocab, width, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (3, tokens), generator=generator)
    return x, weight, targets


def unfused(x, weight, targets):
    return next_token_loss(F.linear(x, weight), targets)


def results(loss_of, x, weight, targets, scale=1.0):
    """Loss, and gradients of scale * loss."""
    loss = loss_of(x, weight, targets)
    return loss.detach(), *torch.autograd.grad(loss * scale, (x, weight))


@pytest.mark.parametrize("logits", [1, 1000, 97 * 45 * 3, 2**40])
@pytest.mark.parametrize("tokens", [1, 45])
def test_float32_agrees_with_the_unfused_pair(tokens, logits, monkeypatch):
    monkeypatch.setitem(kernel.LOGITS_PER_CHUNK, "cpu", logits)
    pair = inputs(tokens)
    for scale in (1.0, 0.25):
        slow, fast = (results(f, *pair, scale) for f in (unfused, fused_head_loss))
        for expected, actual in zip(slow, fast, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("summed", [1, 97 * 8 * 5, 2**40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_close_to_the_unfused_pairs(dtype, summed, monkeypatch):
    monkeypatch.setitem(kernel.LOGITS_PER_CHUNK, "cpu", 97 * 8)
    monkeypatch.setattr(
        kernel, "BUFFERED_LOGIT_GRADIENTS", summed
    )  # one chunk, five, or all per product
    pair = inputs(300, width=16, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in pair[:2]]
    true = results(
        lambda x, w, t: F.cross_entropy((x @ w.t()).flatten(0, 1), t.flatten()), *exact, pair[2]
    )
    slow, fast = (results(f, *pair) for f in (unfused, fused_head_loss))
    for right, expected, actual in zip(true, slow, fast, strict=True):
        error, unfused_error = (
            float((a.double() - right).norm() / right.norm()) for a in (actual, expected)
        )
        assert error <= max(1.2 * unfused_error, 1e-6)


def test_very_unlikely_targets_have_finite_losses():
    x, weight, targets = inputs(spread=200.0)  # probabilities that float32 cannot hold
    slow, fast = (results(f, x, weight, targets) for f in (unfused, fused_head_loss))
    assert slow[0] > 120 and torch.isfinite(fast[0])
    for expected, actual in zip(slow, fast, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_chunk_sizes():
    assert chunk_size(8192, 384, "cpu") == 256
    assert chunk_size(50304, 768, "cpu") == 384
    assert chunk_size(50304, 768, "cuda") == 2**27 // 50304


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_whole_models_agree(training, tied):
    config = replace(TINY, tied_head=tied)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (3, 33), generator=generator)
    outcomes = []
    for fused in (False, True):
        model = GPT(config).train(training)
        initialize(model, config, seed=0)
        model.head.fused = fused
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        outcomes.append({"loss": loss.detach(), **grads})
        assert model(ids[:, 1:]).shape == (3, 32, config.vocab_size)
    for name, expected in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], expected, rtol=1e-4, atol=1e-7, msg=name)


def test_no_gradients_without_grad_mode(monkeypatch):
    x, weight, targets = inputs()
    expected = unfused(x, weight, targets).detach()
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)
    with torch.no_grad():
        torch.testing.assert_close(fused_head_loss(x, weight, targets), expected)
    with pytest.raises(TypeError):
        fused_head_loss(x, weight, targets)


def test_no_logits_are_saved(monkeypatch):
    monkeypatch.setitem(kernel.LOGITS_PER_CHUNK, "cpu", 97 * 8)
    x, weight, targets = inputs(dtype=torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((t.numel(), t.dtype)) or t, lambda t: t
    ):
        fused_head_loss(x, weight, targets)
    assert kept == [(x.numel(), torch.bfloat16), (weight.numel(), torch.float32)]
