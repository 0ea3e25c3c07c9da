"""Norms in bf16 against float64, values and gradients, for realistic numbers of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fgpt.config.schema import ModelConfig
from fgpt.model.norm import make_norm

BF16 = 2**-8  # relative spacing


@pytest.mark.parametrize("mean", [0, 1, 5, 20])
@pytest.mark.parametrize("tokens", [128, 2048])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_bf16_gradients_are_summed_in_float32(kind, tokens, mean):
    config = replace(ModelConfig(), d_model=64, norm=kind)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(tokens, 64, generator=generator) + mean).bfloat16()
    grad_y = (torch.randn(tokens, 64, generator=generator) + 0.3).bfloat16()
    half, exact = make_norm(config).bfloat16(), make_norm(config).double()
    x_half, x_exact = (x.detach().to(p.weight.dtype).requires_grad_() for p in (half, exact))
    y = half(x_half)
    y.backward(grad_y)
    exact(x_exact).backward(grad_y.double())
    pairs = list(zip(half.parameters(), exact.parameters(), strict=True))
    assert len(pairs) == (2 if kind == "layernorm" else 1)
    for actual, expected in [
        (y.detach(), exact(x_exact).detach()),
        *((a.grad, b.grad) for a, b in pairs),
    ]:
        assert float((actual.double() - expected).norm() / expected.norm()) < 2 * BF16
    # torch's own, from a rounded mean
    assert float((x_half.grad.double() - x_exact.grad).norm() / x_exact.grad.norm()) < 4 * BF16


def test_float32_is_torchs_own():
    torch_own, ours = torch.nn.LayerNorm(32), make_norm(replace(ModelConfig(), d_model=32))
    x = torch.randn(5, 32)
    assert torch.equal(ours(x), torch_own(x))
