"""z-loss and logit soft-cap against their formulas, in every loss and in decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fgpt.config.presets import PRESETS
from fgpt.model.gpt import GPT, next_token_loss
from fgpt.model.init import initialize
from fgpt.model.kernels import fused_head_loss as kernel
from fgpt.model.kernels.fused_head_loss import fused_head_loss
from fgpt.model.kv_cache import KVCache

TINY = replace(PRESETS["tiny"], vocab_size=97, n_layer=2, d_model=64, max_seq_len=32)
TERMS = {
    "z-loss": {"z_loss": 0.3},
    "soft-cap": {"logit_softcap": 2.0},
    "both": {"z_loss": 0.3, "logit_softcap": 2.0},
}


def by_hand(logits, targets, z_loss=0.0, logit_softcap=None):
    """(cross entropy, cross entropy + z mean(log(sum(exp))^2)) in float64."""
    logits = logits.double().flatten(0, -2)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    log_sums = logits.exp().sum(-1).log()
    target = logits[torch.arange(len(logits)), targets.flatten()]
    cross_entropy = (log_sums - target).mean()
    return cross_entropy, cross_entropy + z_loss * (log_sums**2).mean()


def tokens(length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, TINY.vocab_size, (3, length), generator=generator)


@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
@pytest.mark.parametrize("chunk", [1, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_loss_is_the_formula(terms, chunk, dtype, monkeypatch):
    monkeypatch.setitem(kernel.LOGITS_PER_CHUNK, "cpu", chunk)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 15, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(97, 16, generator=generator).to(dtype).requires_grad_()
    targets = tokens(15)
    value, total = by_hand(F.linear(x.double(), weight.double()), targets, **terms)
    loss = fused_head_loss(
        x,
        weight,
        targets,
        softcap=terms.get("logit_softcap"),
        z_loss=terms.get("z_loss", 0.0),
    )
    rounding = 1e-6 if dtype == torch.float32 else 2**-6
    assert loss.item() == pytest.approx(value.item(), rel=rounding)
    expected = torch.autograd.grad(2 * total, (x, weight))
    for actual, wanted in zip(torch.autograd.grad(2 * loss, (x, weight)), expected, strict=True):
        assert (actual.double() - wanted).norm() < rounding * wanted.double().norm()


def test_the_plain_loss_is_the_formula():
    logits = (5 * torch.randn(3, 15, 97)).requires_grad_()
    value, total = by_hand(logits, tokens(15), z_loss=0.3)
    loss = next_token_loss(logits, tokens(15), z_loss=0.3)
    assert loss.item() == pytest.approx(value.item(), rel=1e-6)
    (expected,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
def test_a_model_trains_on_the_sum_and_reports_the_cross_entropy(terms, fused):
    config = replace(TINY, **terms)
    ids, targets = tokens(33)[:, :-1], tokens(33)[:, 1:]
    gradients, values = [], []
    for losses in (None, by_hand):
        model = GPT(config)
        initialize(model, config, seed=0)
        with torch.no_grad():
            model.head.weight.mul_(20)  # logits that the cap and the z-loss change
        model.head.fused = fused
        if losses is None:
            loss = model(ids, targets)
            values.append(loss.item())
            values.append(model.eval()(ids, targets).item())
        else:
            model.head.softcap = None
            value, loss = losses(model(ids), targets, **terms)
            values.append(value.item())
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_z_loss_changes_no_value_of_a_run_without_it():
    ids = tokens(33)
    losses = []
    for z_loss in (0.0, 1.0):
        model = GPT(replace(TINY, z_loss=z_loss))
        initialize(model, TINY, seed=0)
        losses.append(model(ids[:, :-1], ids[:, 1:]).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_logits_are_capped(dtype):
    capped, free = (GPT(replace(TINY, logit_softcap=cap)).to(dtype).eval() for cap in (0.05, None))
    for model in (capped, free):
        initialize(model, TINY, seed=0)
    cache = KVCache(TINY, torch.zeros(3, dtype=torch.int64), 32, dtype)
    logits = capped.decode(tokens(32), cache)
    assert logits.dtype == dtype and logits.abs().max() <= 0.05
    expected = 0.05 * torch.tanh(free(tokens(32))[:, -1].float() / 0.05)
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.float(), expected, rtol=rounding, atol=rounding * 0.05)
